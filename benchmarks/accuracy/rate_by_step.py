"""Does a learning rate that falls with every step help `fit`, beside one that falls by epoch?

    python benchmarks/accuracy/rate_by_step.py --data-root data

The tasks of `rivals.py` at one budget: by the defaults of `fit`, and by the same optimizer with a
cosine that is stepped after each epoch.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

sys.path[:0] = [str(Path(__file__).parent)]

from rivals import EPOCHS, LEARNING_RATE, SIZES, Case, load_case  # noqa: E402
from tasks import Batches, accuracy  # noqa: E402

import cgmq_fx  # noqa: E402

BUDGET = "1%"


def trained(case: Case, seed: int, *, by_step: bool) -> float:
    """Return the test accuracy after `fit`."""
    torch.manual_seed(seed)
    prepared = case.prepared(BUDGET)
    own = {}
    if not by_step:
        optimizer = torch.optim.Adam(prepared.parameters(), LEARNING_RATE)
        own = {"optimizer": optimizer, "scheduler": CosineAnnealingLR(optimizer, EPOCHS)}
    data = Batches(case.train)
    result = cgmq_fx.fit(prepared, data, F.cross_entropy, epochs=EPOCHS, progress=False, **own)
    return accuracy(result.fixed, case.test)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for task, samples in SIZES.items():
        case = load_case(task, samples, arguments.data_root)
        for by_step in (False, True):
            found = [trained(case, seed, by_step=by_step) for seed in arguments.seeds]
            print(
                f"{task.name} at {BUDGET}, rate by {'step' if by_step else 'epoch'}: "
                f"mean {statistics.mean(found):.2f} %, {found}",
                flush=True,
            )


if __name__ == "__main__":
    main()
