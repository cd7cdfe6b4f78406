"""Does `prepare` take timm's models, and do the laws hold on them?

300 models are drawn with a fixed seed across families, built without pretrained weights, filled
with random numbers and prepared for the smallest image that they take. `sweep_runner` says which
laws are checked.

    python benchmarks/timm_sweep.py --rows build/timm.jsonl --resume --output results.md
    python benchmarks/timm_sweep.py --models 'efficientnet*,swin*'
"""

import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

from sweep_page import Sweep, run  # noqa: E402
from timm_models import (  # noqa: E402
    COUNT,
    GROUP,
    MOST_PARAMETERS,
    SEED,
    draw,
    subject,
    timm,
    torchvision,
)

RULES = (
    f"{COUNT} models drawn with seed {SEED}: each module of `timm.models` (the family) gives one "
    f"in turn, and a model of more than {MOST_PARAMETERS // 10**6} M parameters is passed over. "
    f"A model that is made for one size of image is made for the smallest that it takes."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep."""
    return run(
        Sweep(
            title="timm sweep",
            script="timm_sweep.py",
            subjects=[subject(name) for name in draw()],
            versions={"timm": timm.__version__, "torchvision": torchvision.__version__},
            wanted={GROUP: 0.95},
            rules=RULES,
            preload=("timm_models",),
        ),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
