"""The command ``cgmq-fx``: try the library out, work with cost tables, verify files."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from cgmq_fx.cli_tables import add_tables
from cgmq_fx.cli_verify import add_verify
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
    except BrokenPipeError:  # what reads the output, such as `head`, has seen enough
        sys.stderr.close()
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
    add_tables(commands)
    add_verify(commands)
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
