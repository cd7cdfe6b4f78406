"""Which laws of `check_pass` do passes break that ship with torch and torchao?

Each pass of `torch_passes.py` runs on drawn cases, those on exported graphs on a quarter as many.
Every way in which one breaks a law is then minimised by Hypothesis. The examples follow from the
code of the kit alone.

    python benchmarks/kit_on_torch_passes.py --examples 120 --jobs 2
"""

import argparse
import contextlib
import importlib.util
import io
import multiprocessing as mp
import platform
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import NoSuchExample
from torch_passes import TARGETS, Target

from cgmq_fx.testing import Case, LawError, check_pass

QUIET = settings(
    database=None,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
_VARIABLE = re.compile(r"'[^']*'|\[[^]]*\]|\([^()]*\)|-?\d[\w.e+-]*")


@dataclass(frozen=True)
class Break:
    """One way to break a law.

    Attributes:
        law: its name; ``raises`` where the pass itself fails.
        kind: the first fault, without names and numbers.
    """

    law: str
    kind: str


def broken(target: Target, drawn: Case) -> tuple[Break, str] | None:
    """Check one case; return how the pass breaks a law, and the fault in full."""
    case = target.graph(drawn) if target.graph else drawn
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a graph that fails prints its code
            check_pass(target.make(case), case, numerics=target.numerics, training=target.training)
    except LawError as error:
        return Break(error.law, kind_of(error.faults[0])), error.faults[0]
    except Exception as error:  # whatever a pass raises
        text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Break("raises", kind_of(text)), f"{text} ({Path(place.filename).name})"
    return None


def kind_of(fault: str) -> str:
    """Return a fault without what differs from case to case."""
    return _VARIABLE.sub("…", fault.partition("\n")[0])[:90]


def explore(target: Target, examples: int) -> tuple[int, Counter[Break], dict[Break, Case]]:
    """Check drawn cases; return how many, how often each break occurred, and its shortest case."""
    counts: Counter[Break] = Counter()
    shortest: dict[Break, Case] = {}
    tried = 0

    @settings(QUIET, max_examples=examples)
    @given(target.cases)
    def try_one(case: Case) -> None:
        nonlocal tried
        tried += 1
        found = broken(target, case)
        if found:
            counts[found[0]] += 1
            best = shortest.setdefault(found[0], case)
            if len(case.source) < len(best.source):
                shortest[found[0]] = case

    try_one()
    return tried, counts, shortest


def smallest(target: Target, kind: Break, known: Case, examples: int) -> Case:
    """Return the case to which Hypothesis shrinks a break, or the shortest one known."""

    def breaks(case: Case) -> bool:
        found = broken(target, case)
        return found is not None and found[0] == kind

    try:
        found = hypothesis.find(
            target.cases,
            breaks,
            settings=settings(QUIET, max_examples=examples, phases=[Phase.generate, Phase.shrink]),
        )
    except NoSuchExample:
        return known
    return min((found, known), key=lambda case: len(case.source))


def section(name: str, examples: int) -> list[str]:
    """Return the part of the page about one pass."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    target = TARGETS[name]
    if importlib.util.find_spec(target.needs) is None:
        return [f"## {name}", "", f"Left out: {target.needs} is not installed.", ""]
    started = time.process_time()
    if target.graph:  # an export takes as long as dozens of traces
        examples //= 4
    tried, counts, shortest = explore(target, examples)
    lines = [f"## {name}", ""]
    where = "evaluation and training" if target.training else "evaluation"
    lines += [
        f"Promise: {target.numerics.name}, in {where} ({target.promise}). "
        f"{tried} cases, {tried - sum(counts.values())} without a fault.",
        "",
    ]
    for kind, count in counts.most_common():
        case = smallest(target, kind, shortest[kind], examples)
        found = broken(target, case)
        assert found is not None, "a break that comes and goes"
        fault = " ".join(found[1].split())
        lines += [f"**{kind.law}**, {count} cases: {fault}", ""]
        lines += [verdict(target, kind), "", "```python"]
        lines += [core(case.source), "```", ""]
    print(
        f"{name}: {tried} cases, {dict(counts)}, {time.process_time() - started:.0f} s", flush=True
    )
    return lines


def verdict(target: Target, kind: Break) -> str:
    """Return what is known of a break."""
    text = f"{kind.law} {kind.kind}"
    return next((known for words, known in target.verdicts if words in text), "Not judged yet.")


def core(source: str) -> str:
    """Return the classes of a drawn model and its inputs, without what every script repeats."""
    model = source.partition("from torch import fx, nn\n\n\n")[2].partition("\n\n\ndef make")[0]
    inputs = re.findall(r"^    return (\(.*|dict\(.*)", source, re.MULTILINE)
    return "\n".join([model, "", "", "# Inputs:", *(f"# {text}" for text in inputs)])


def document(parts: Sequence[list[str]], command: str) -> str:
    """Return the page of results."""
    packages = " ".join(
        f"{name} {version(name)}," for name in ("torch", "torchao", "hypothesis") if _has(name)
    )
    head = [
        "# What the kit finds in passes that ship with torch",
        "",
        f"    {command}",
        "",
        f"{packages} Python {platform.python_version()}.",
        "",
    ]
    return "\n".join([*head, *(line for part in parts for line in part)])


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=300, help="cases for each pass")
    parser.add_argument("--passes", default="*", help="which passes, a glob")
    parser.add_argument("--output", type=Path, help="where to write the page; printed otherwise")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(argv)
    chosen = [name for name in TARGETS if fnmatch(name, options.passes)]
    with mp.get_context("spawn").Pool(options.jobs) as pool:
        jobs = [(name, options.examples) for name in chosen]
        parts = pool.starmap(section, jobs, chunksize=1)
    text = document(
        parts, f"python benchmarks/kit_on_torch_passes.py --examples {options.examples}"
    )
    if options.output is None:
        print(text)
    else:
        options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
