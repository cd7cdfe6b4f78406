"""The command ``cgmq-fx``: try the library out, look at cost tables, check one of your own."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from cgmq_fx.errors import CgmqError

# What a command needs is imported when it runs: torch alone takes longer than --help should.

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments; by default those of the process.

    Raises:
        SystemExit: the arguments make no sense (code 2), or only ``--help`` or ``--version`` was
            asked for (code 0).
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except CgmqError as error:
        print(f"cgmq-fx: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("cgmq-fx: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cgmq-fx",
        description="Mixed-precision quantization of PyTorch models under a hard budget.",
    )
    parser.add_argument("--version", action="version", version=f"cgmq-fx {version('cgmq-fx')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_tables(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    demo = commands.add_parser(
        "demo",
        help="train, quantize to a budget and report, on a small data set",
        description=(
            "Train a small convolutional network on scikit-learn's digits, quantize it to a "
            "budget, and write the report, the history and both networks into a folder."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, kind, default, metavar, text in (
        ("--out", Path, Path("cgmq-fx-demo"), "DIR", "folder of the results"),
        ("--budget", str, "0.6%", "BUDGET", "upper bound on bit operations: 0.6%%, '4 MBOP'"),
        ("--seed", _count, 0, "N", "of the data split and of all training"),
        ("--epochs", _positive, 20, "N", "epochs of guided training"),
        ("--float-epochs", _positive, 15, "N", "epochs of float training"),
    ):
        demo.add_argument(name, type=kind, default=default, metavar=metavar, help=text)
    demo.set_defaults(run=_demo)


def _add_tables(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tables = commands.add_parser("tables", help="list, show or check cost tables")
    actions = tables.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list the built-in cost tables")
    listing.set_defaults(run=_list_tables)
    show = actions.add_parser("show", help="print the rows of a cost table")
    show.add_argument("table", metavar="NAME", help="a built-in table, or a .toml or .json file")
    show.set_defaults(run=_show_table)
    check = actions.add_parser("check", help="check a cost table and print every fault")
    check.add_argument("table", metavar="FILE", help="a .toml or .json file")
    check.set_defaults(run=_check_table)


def _count(text: str) -> int:
    return _whole(text, least=0)


def _positive(text: str) -> int:
    return _whole(text, least=1)


def _whole(text: str, least: int) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _demo(arguments: argparse.Namespace) -> int:
    import torch

    from cgmq_fx.demo import run_demo

    # More threads only wait for each other in so small a network; with one, equal seeds give equal
    # results on every machine of a kind.
    torch.set_num_threads(1)
    run_demo(
        arguments.out,
        budget=arguments.budget,
        seed=arguments.seed,
        float_epochs=arguments.float_epochs,
        epochs=arguments.epochs,
    )
    return 0


def _list_tables(arguments: argparse.Namespace) -> int:
    from cgmq_fx.table_text import print_list

    print_list()
    return 0


def _show_table(arguments: argparse.Namespace) -> int:
    from cgmq_fx.cost.load import load_table
    from cgmq_fx.table_text import print_table

    print_table(load_table(arguments.table))
    return 0


def _check_table(arguments: argparse.Namespace) -> int:
    from cgmq_fx.cost.load import load_table

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = load_table(Path(arguments.table))
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    rows = "1 row" if len(table.rows) == 1 else f"{len(table.rows)} rows"
    print(f"{arguments.table}: sound; table {table.name!r} in {table.unit}, {rows}")
    print(f"sha256 {table.digest}")
    return 0
