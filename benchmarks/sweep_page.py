"""The command line and the Markdown page of a sweep."""

import argparse
import fnmatch
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from sweep_runner import BOTH_BUDGETS, BUDGET, LAWS, Limits, Outcome, Subject, sweep

_HEAD = (
    "model", "family", "parameters", "input", "prepare", "all", "MACs", "quantized", "floor",
    "first batch", *LAWS[:6], "MACs exact",
)  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """A list of models and what is expected of them.

    Attributes:
        title: of the page.
        script: the file that writes it.
        subjects: the models.
        versions: of the packages that the models come from.
        wanted: the share of each group that must be prepared with every law; a group that is left
            out may be refused, but no graph may be wrong.
        rules: how the list was made, in sentences.
        preload: modules that every process needs.
    """

    title: str
    script: str
    subjects: Sequence[Subject]
    versions: Mapping[str, str]
    wanted: Mapping[str, float]
    rules: str = ""
    preload: Sequence[str] = field(default_factory=tuple)


def run(work: Sweep, argv: Sequence[str] | None = None) -> int:
    """Run the sweep as the command line says; return 0 when enough models pass."""
    parser, options = _options(work, argv)
    globs = options.models.split(",")
    chosen = [s for s in work.subjects if any(fnmatch.fnmatch(s.name, glob) for glob in globs)]
    if not chosen:
        parser.error(f"no model matches {options.models!r}")
    if options.list:
        print(
            *(f"{subject.name}  ({subject.group}; {subject.family})" for subject in chosen),
            sep="\n",
        )
        return 0
    found = _known(options.rows) if options.resume else {}
    outcomes = [found[subject.name] for subject in chosen if subject.name in found]
    waiting = [subject for subject in chosen if subject.name not in found]
    if options.rows and not options.resume:
        options.rows.unlink(missing_ok=True)
    print(" | ".join(_HEAD), flush=True)
    for outcome in sweep(waiting, options.jobs, Limits(options.seconds), work.preload):
        outcomes.append(outcome)
        print(f"[{len(outcomes)}/{len(chosen)}]", " | ".join(_row(outcome)), flush=True)
        print(*(f"    {line}" for line in _reasons([outcome])), sep="\n", flush=True)
        if options.rows:
            with options.rows.open("a") as rows:
                print(json.dumps(asdict(outcome)), file=rows)
    order = [subject.name for subject in chosen]
    outcomes.sort(key=lambda outcome: order.index(outcome.name))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(document(work, outcomes))
    for group, members in _groups(outcomes).items():
        print(f"{group}: {summary(members)}")
    return 0 if is_enough(work, outcomes) else 1


def _options(
    work: Sweep, argv: Sequence[str] | None
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog=work.script, description=work.title)
    parser.add_argument("--models", default="*", help="globs over model names, with commas")
    parser.add_argument("--list", action="store_true", help="print the models and stop")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--seconds", type=float, default=600.0, help="the time of one model")
    parser.add_argument("--output", type=Path, help="where to write the page, as Markdown")
    parser.add_argument("--rows", type=Path, help="where to write each outcome, as a line of JSON")
    parser.add_argument("--resume", action="store_true", help="keep what stands in --rows")
    options = parser.parse_args(argv)
    if options.resume and not options.rows:
        parser.error("--resume reads the file that --rows names")
    return parser, options


def _known(path: Path) -> dict[str, Outcome]:
    lines = path.read_text().splitlines() if path.exists() else []
    outcomes = [Outcome.of_row(json.loads(line)) for line in lines]
    return {outcome.name: outcome for outcome in outcomes}


def is_enough(work: Sweep, outcomes: Sequence[Outcome]) -> bool:
    """Tell whether each group has its share, nothing crashed and no graph is wrong."""
    for group, members in _groups(outcomes).items():
        share = work.wanted.get(group, 0.0)
        if sum(outcome.lawful and outcome.exact for outcome in members) < share * len(members):
            return False
    tried = [tried for outcome in outcomes for tried in (outcome, *outcome.parts)]
    return all(outcome.refused or (outcome.lawful and outcome.exact) for outcome in tried)


def _groups(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.group, []).append(outcome)
    return groups


# -- the page --------------------------------------------------------------------------------------


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the line that says it all."""
    total = len(outcomes)
    parts = sum(any(part.lawful for part in outcome.parts) for outcome in outcomes)
    return (
        f"prepared with laws 1 to 6 and exact MACs "
        f"{sum(outcome.lawful and outcome.exact for outcome in outcomes)}/{total}, "
        f"refused {sum(bool(outcome.refused) for outcome in outcomes)} (of these prepared in part "
        f"{parts}), crashed {sum(bool(outcome.crashed) for outcome in outcomes)}, "
        f"wrong graphs {sum(bool(outcome.broken) for outcome in outcomes)}, "
        f"MACs that differ {sum(bool(outcome.faults.get('MACs')) for outcome in outcomes)}"
    )


def document(work: Sweep, outcomes: Sequence[Outcome]) -> str:
    """Return the result as a Markdown page."""
    versions = {"torch": torch.__version__, **work.versions}
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    sections = [
        f"# {work.title}",
        f"Written by `benchmarks/{work.script}`; {made_with}, Python {platform.python_version()}, "
        f"{platform.machine()}, one thread. Budget: {BUDGET} of bit operations; where 'first "
        f"batch' was tried, also {BOTH_BUDGETS}. 'input' is one sample; 'prepare' and 'all' (with "
        f"every check) are processor seconds; 'quantized' is the share of MACs; 'floor' is the "
        f"lowest reachable share of the 32-bit cost; 'first batch' tells whether the model is "
        f"prepared without example inputs too.",
        work.rules,
    ]
    for group, members in _groups(outcomes).items():
        missed = "\n".join(_reasons(members)) or "None."
        sections += [f"## {group}", f"**{summary(members)}.**", f"### Misses\n\n{missed}"]
        sections += [f"### Models\n\n{_table(members)}"]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(outcomes: Sequence[Outcome]) -> str:
    rows = [_row(tried) for outcome in outcomes for tried in (outcome, *outcome.parts)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (_HEAD, ["---"] * len(_HEAD), *rows))


def _row(outcome: Outcome) -> list[str]:
    """Return the cells of one model."""
    parameters = f"{outcome.parameters / 1e6:.1f} M"
    if not outcome.prepared:
        said = "refused" if outcome.refused else "CRASH"
        start = [outcome.name, outcome.family, parameters, outcome.shape or "-"]
        return [*start, *["-"] * 6, *[said] * len(LAWS)]
    return [
        outcome.name,
        outcome.family,
        parameters,
        outcome.shape,
        f"{outcome.prepare_seconds:.1f} s",
        f"{outcome.total_seconds:.1f} s",
        f"{outcome.macs / 1e6:,.1f} M",
        f"{100 * outcome.quantized:.2f} %",
        f"{100 * outcome.floor:.3f} %",
        outcome.first_batch or "not tried",
        *("FAIL" if outcome.faults.get(law) else "pass" for law in LAWS),
    ]


def _reasons(outcomes: Sequence[Outcome]) -> list[str]:
    """Return one line for each miss."""
    lines = []
    for outcome in outcomes:
        for tried in (outcome, *outcome.parts):
            if tried.refused:
                lines.append(f"- {tried.name}, refused: {tried.refused}")
            if tried.crashed:
                lines.append(f"- {tried.name}, CRASHED: {tried.crashed}")
            for law, faults in tried.faults.items():
                lines += [f"- {tried.name}, {law}: {fault}" for fault in faults]
        if outcome.parts:
            taken = [part.name for part in outcome.parts if part.lawful and part.exact]
            lines.append(f"- {outcome.name}, prepared in part: {', '.join(taken) or 'nothing'}")
    return [line.replace("\n", " ")[:900] for line in lines]
