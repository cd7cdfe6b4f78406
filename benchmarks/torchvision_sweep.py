"""Does `prepare` take torchvision's models, and do the laws hold on them?

Every model is built without pretrained weights, filled with random numbers and prepared at the
smallest input that it takes. `sweep_runner` says which laws are checked.

    python benchmarks/torchvision_sweep.py --models 'resnet*' --jobs 2
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "examples")]

from sweep_page import Sweep, run  # noqa: E402
from torchvision_models import PLAIN, subjects, torchvision  # noqa: E402


def main() -> int:
    """Run the sweep."""
    return run(
        Sweep(
            title="Torchvision sweep",
            script="torchvision_sweep.py",
            subjects=subjects(),
            versions={"torchvision": torchvision.__version__},
            wanted={PLAIN: 0.98},
            preload=("torchvision_models",),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
