"""Do the laws hold on thousands of drawn models?

Each example is a model drawn by `cgmq_fx.testing.models`, prepared under a random budget with
random options and lowered at random bit-widths, all held to `check_prepare`.
The examples follow from the seed alone; a failure is printed with the source of its model.

    python benchmarks/check_prepare_overnight.py --examples 5000 --seed 0 --jobs 1
"""

import argparse
import multiprocessing as mp
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from cgmq_fx.errors import CgmqError
from cgmq_fx.testing import Case, check_prepare, models

RESULTS = Path(__file__).resolve().parent / "results" / "check_prepare_overnight.md"
_BATCH = 100


@dataclass(frozen=True)
class Outcome:
    """What became of one example; `error` is empty where every law holds."""

    number: int
    traits: tuple[str, ...]
    options: str
    seconds: float
    error: str = ""


def draw_cases(number: int, count: int) -> list[Case]:
    """Return the cases of one batch, the same for the same number."""
    found: list[Case] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
    )
    @given(models(max_layers=8))
    def keep(case: Case) -> None:
        found.append(case)

    keep()
    return found


def random_options(draw: random.Random) -> dict[str, Any]:
    """Return a budget and other arguments of `prepare`; some budgets are infeasible."""
    shares = {name: f"{100 ** draw.uniform(-0.2, 1):.4f}%" for name in ("bops", "weight_memory")}
    names = draw.choice((("bops",), ("weight_memory",), ("bops", "weight_memory")))
    return {
        "budget": {name: shares[name] for name in names},
        "per_channel": draw.random() < 0.7,
        "learn_input_bits": draw.random() < 0.3,
        "widths": draw.choice(((2, 4, 8, 16, 32), (2, 3, 5, 8), (8,), (4, 8))),
    }


def examine(number: int, case: Case, options: dict[str, Any]) -> Outcome:
    """Check one example."""
    started = time.process_time()
    error = ""
    try:
        check_prepare(case, seed=number, **options)
    except (AssertionError, CgmqError) as broken:
        error = str(broken)
    except Exception as crash:  # a crash is a finding like any other
        error = f"{type(crash).__name__}: {crash}"
    if error and case.source not in error:
        error += f"\n\nThe case:\n{case.source}"
    spent = time.process_time() - started
    return Outcome(number, tuple(sorted(case.traits)), repr(options), spent, error)


def batch(job: tuple[int, int, int]) -> list[Outcome]:
    """Draw and check one batch: its seed, the number of its first example, how many."""
    base, first, count = job
    torch.set_num_threads(1)
    cases = draw_cases(base * 1_000_003 + first, count)
    return [
        examine(first + at, case, random_options(random.Random(base * 1_000_003 + first + at)))
        for at, case in enumerate(cases)
    ]


def outcomes(examples: int, base: int, jobs: int) -> Iterator[list[Outcome]]:
    """Yield batch after batch."""
    work = [(base, at, min(_BATCH, examples - at)) for at in range(0, examples, _BATCH)]
    if jobs == 1:
        yield from map(batch, work)
        return
    with mp.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(batch, work)


def document(found: Sequence[Outcome], base: int) -> str:
    """Return the page of results."""
    failed = [outcome for outcome in found if outcome.error]
    traits = Counter(trait for outcome in found for trait in outcome.traits)
    seconds = sum(outcome.seconds for outcome in found)
    lines = [
        "# Drawn models under `check_prepare`",
        "",
        f"{len(found)} examples with seed {base}: {len(found) - len(failed)} hold every law, "
        f"{len(failed)} do not. {seconds:.0f} s of processor time. "
        f"torch {torch.__version__}, Python {platform.python_version()}.",
        "",
        f"    python benchmarks/check_prepare_overnight.py --examples {len(found)} --seed {base}",
        "",
        "| trait | models with it |",
        "| --- | --- |",
        *(f"| {trait} | {count} |" for trait, count in sorted(traits.items())),
        "",
    ]
    for outcome in failed:
        lines += [f"## Example {outcome.number}", "", outcome.options, "", "```"]
        lines += [outcome.error, "```", ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; the exit code is 1 where a law is broken."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=5000, help="how many models to draw")
    parser.add_argument("--seed", type=int, default=0, help="of models, budgets and bit-widths")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where to write the page")
    options = parser.parse_args(argv)
    found: list[Outcome] = []
    for done in outcomes(options.examples, options.seed, options.jobs):
        found += done
        failed = sum(bool(outcome.error) for outcome in found)
        print(f"[{len(found)}/{options.examples}] {failed} failed", flush=True)
        for outcome in done:
            if outcome.error:
                print(f"example {outcome.number}, {outcome.options}\n{outcome.error}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(document(found, options.seed), encoding="utf-8")
    return 1 if any(outcome.error for outcome in found) else 0


if __name__ == "__main__":
    sys.exit(main())
