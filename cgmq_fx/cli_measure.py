"""The commands ``cgmq-fx tables measure`` and ``cgmq-fx tables import-csv``."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cgmq_fx.cli_arguments import MODEL_HELP, add_input_shapes
from cgmq_fx.errors import UsageError

if TYPE_CHECKING:
    from cgmq_fx.cost.table import CostTable
    from cgmq_fx.measure.measure import Measurement

# What a command needs is imported when it runs: torch alone takes longer than --help should.

RUNTIMES = ("onnxruntime", "inductor", "executorch")


def add_measure(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``measure`` to the actions of ``tables``."""
    measure = actions.add_parser(
        "measure",
        help="time the operations of models on this machine, and write a cost table in ms",
        description="Time every distinct operation of models on this machine, at every bit-width "
        "that the runtime has, and write a cost table in ms. docs/measuring.md says how.",
        epilog="example: cgmq-fx tables measure torchvision.models:resnet18 --runtime onnxruntime "
        "--input-shape 1,3,224,224 --output board.toml",
    )
    measure.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    measure.add_argument("--runtime", required=True, choices=RUNTIMES, help="what runs the models")
    add_input_shapes(measure)
    measure.add_argument("--rounds", type=_rounds, default=15, help="turns of each callable (15)")
    _add_output(measure)
    measure.set_defaults(run=_measure)


def add_import(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``import-csv`` to the actions of ``tables``."""
    importing = actions.add_parser(
        "import-csv",
        help="make a cost table of measurements in a CSV file",
        description="Make a cost table of measurements that were made elsewhere. "
        "docs/measuring.md describes the columns.",
    )
    importing.add_argument("file", metavar="FILE", type=Path, help="a .csv file")
    importing.add_argument("--unit", required=True, help="unit of the costs, such as ms or uJ")
    importing.add_argument("--source", default="", help="how it was measured, and on what")
    _add_output(importing)
    importing.set_defaults(run=_import)


def _add_output(action: argparse.ArgumentParser) -> None:
    action.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="the .toml file to write"
    )
    action.add_argument("--name", default="", help="of the table (that of the file)")


def _rounds(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 3")
    return int(text)


def _measure(arguments: argparse.Namespace) -> int:
    from cgmq_fx.measure.measure import measure_table
    from cgmq_fx.measure.runtimes import runtime
    from cgmq_fx.measure.timing import TimingPlan
    from cgmq_fx.price_model import load_model, zero_inputs

    _check_output(arguments.output)
    inputs = zero_inputs(arguments.shapes)
    found = measure_table(
        [(load_model(place), inputs) for place in arguments.models],
        runtime(arguments.runtime),
        name=arguments.name or arguments.output.stem,
        plan=TimingPlan(rounds=arguments.rounds),
        log=lambda text: print(text, file=sys.stderr),
    )
    _tell(found)
    _write(found.table, arguments.output)
    return 0


def _tell(found: "Measurement") -> None:
    for check in found.networks:
        bits = "w{} a{}".format(*check.pair)
        fitted = check.summed(found.factors)
        print(f"{check.name} {bits}: measured {check.measured:.4g} ms, table {fitted:.4g} ms")
    left_out, rounds = found.outliers
    print(f"{found.operations} operations; {left_out} of {rounds} rounds left out as outliers")
    for operation in found.unmeasured:
        print(
            f"warning: {operation.name!r} ({operation.op}, {operation.macs:,} MACs) was not timed "
            "and has no row",
            file=sys.stderr,
        )


def _import(arguments: argparse.Namespace) -> int:
    from cgmq_fx.measure.import_csv import import_csv

    _check_output(arguments.output)
    table = import_csv(
        arguments.file,
        unit=arguments.unit,
        name=arguments.name or arguments.output.stem,
        source=arguments.source,
    )
    _write(table, arguments.output)
    return 0


def _check_output(path: Path) -> None:
    """Refuse before anything is measured what could not be written after it."""
    if path.suffix != ".toml" or not path.parent.is_dir():
        raise UsageError(
            f"--output {str(path)!r} is not a .toml file in a folder that is there; give one such "
            "as board.toml"
        )


def _write(table: "CostTable", path: Path) -> None:
    path.write_text(table.to_toml(), encoding="utf-8")
    rows = "1 row" if len(table.rows) == 1 else f"{len(table.rows)} rows"
    print(f"{path}: table {table.name!r} in {table.unit}, {rows}, sha256 {table.digest}")
