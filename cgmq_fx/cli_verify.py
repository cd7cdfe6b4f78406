"""The command ``cgmq-fx verify FILE``: recompute what a file costs, and say whether it holds."""

import argparse
import sys

from cgmq_fx.errors import CgmqError

# What a command needs is imported when it runs: torch alone takes longer than --help should.

EXIT_OVER_BUDGET = 1
EXIT_TROUBLE = 2


def add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``verify`` to the commands."""
    verify = commands.add_parser(
        "verify",
        help="recompute the cost of an exported file, from the file alone",
        description="Recompute the cost of an exported file, from the file alone; nothing in it is "
        "run. Ends with 0 where every budget holds, with 1 where one does not, with 2 where the "
        "file is damaged or contradicts itself, or an argument makes no sense.",
        epilog="example: cgmq-fx verify model.safetensors --budget bops=0.5%% "
        "--budget 'weight_memory=64 KiB'",
    )
    verify.add_argument("file", metavar="FILE", help="what cgmq_fx.export wrote")
    verify.add_argument(
        "--budget",
        action="append",
        default=[],
        type=_bound,
        metavar="[NAME=]BUDGET",
        help="a bound, in place of the file's own on the same resource; any number of times",
    )
    verify.add_argument(
        "--cost-table",
        action="append",
        default=[],
        metavar="TABLE",
        help="price it by this table too: a name, or a .toml or .json file; any number of times",
    )
    verify.add_argument("--json", action="store_true", help="print JSON with exact amounts")
    verify.set_defaults(run=_verify)


def _bound(text: str) -> tuple[str | None, str]:
    name, equals, bound = text.rpartition("=")
    if equals and not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not BUDGET or NAME=BUDGET, such as bops=1%%")
    return name.strip() or None, bound.strip()


def _verify(arguments: argparse.Namespace) -> int:
    from cgmq_fx.budget import Budget
    from cgmq_fx.verify import verify

    try:
        names = [name for name, _ in arguments.budget]
        if len(set(names)) < len(names):
            print(f"cgmq-fx: --budget names {names}, one of them twice", file=sys.stderr)
            return EXIT_TROUBLE
        budget = Budget(dict(arguments.budget)) if names else None
        found = verify(arguments.file, budget, arguments.cost_table or None)
    except CgmqError as error:
        print(f"cgmq-fx: {error}", file=sys.stderr)
        return EXIT_TROUBLE
    print(found.to_json() if arguments.json else found)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0 if found.satisfied else EXIT_OVER_BUDGET
