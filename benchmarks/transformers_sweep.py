"""Does `prepare` take Hugging Face's transformers, and do the laws hold on them?

Thirty architectures are built from tiny configurations with random weights and prepared from a
dict of keyword inputs. `sweep_runner` says which laws are checked, `transformers_models` how the
list was made. Nothing is downloaded.

    pip install 'transformers==5.23.0'
    python benchmarks/transformers_sweep.py --models 'bert,*vit*' --jobs 2
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

from sweep_page import Sweep, run  # noqa: E402
from transformers_models import GROUP, RULES, subjects, transformers  # noqa: E402


def main() -> int:
    """Run the sweep."""
    return run(
        Sweep(
            title="Transformers sweep",
            script="transformers_sweep.py",
            subjects=subjects(),
            versions={"transformers": transformers.__version__},
            wanted={GROUP: 0.85},
            rules=RULES,
            preload=("transformers_models",),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
