"""The commands ``cgmq-fx tables ...``: list, show, check, compare and make cost tables, price."""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from cgmq_fx.cli_arguments import MODEL_HELP, add_input_shapes, width
from cgmq_fx.cli_measure import add_import, add_measure
from cgmq_fx.errors import CgmqError, CostTableError

if TYPE_CHECKING:
    from cgmq_fx.cost.table import CostTable

# What a command needs is imported when it runs: torch alone takes longer than --help should.

EXIT_DIFFERENT = 1
EXIT_TROUBLE = 2
_TABLE_HELP = "the name of a table, or a .toml or .json file"


def add_tables(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``tables`` and all its actions to the commands."""
    tables = commands.add_parser(
        "tables", help="list, show, check, compare, measure and import cost tables; price a model"
    )
    actions = tables.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list the cost tables that can be named")
    listing.set_defaults(run=_list)
    show = actions.add_parser("show", help="print the rows of a cost table, with their sources")
    show.add_argument("table", metavar="NAME", help=_TABLE_HELP)
    show.set_defaults(run=_show)
    check = actions.add_parser("check", help="check a cost table and print every fault")
    check.add_argument("table", metavar="FILE", help="a .toml or .json file")
    check.add_argument(
        "--strict", action="store_true", help="refuse costs that fall when bits rise"
    )
    check.set_defaults(run=_check)
    schema = actions.add_parser("schema", help="print the JSON Schema of the format, for editors")
    schema.set_defaults(run=_schema)
    diff = actions.add_parser(
        "diff",
        help="compare two cost tables; row order never matters",
        description="Compare two cost tables. Ends with 0 where they are the same, with 1 where "
        "they differ, with 2 where one cannot be read.",
    )
    for name in ("first", "second"):
        diff.add_argument(name, metavar=name.upper(), help=_TABLE_HELP)
    diff.set_defaults(run=_diff)
    _add_price(actions)
    add_measure(actions)
    add_import(actions)


def _add_price(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    price = actions.add_parser(
        "price",
        help="price a model at given bit-widths, without training",
        description="Price a model at given bit-widths, without training. A tensor whose bit-width "
        "the table does not have gets the next wider one that it has.",
        epilog="example: cgmq-fx tables price torchvision.models:resnet18 --table bops "
        "--input-shape 1,3,224,224 --weights 4 --bits conv1_weight=8",
    )
    price.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    price.add_argument("--table", required=True, metavar="TABLE", help=_TABLE_HELP)
    add_input_shapes(price)
    for name, what in (("--weights", "weights"), ("--activations", "activations")):
        price.add_argument(
            name, type=width, default=8, metavar="BITS", help=f"bit-width of all {what} (8)"
        )
    price.add_argument(
        "--bits",
        action="append",
        default=[],
        type=_site_bits,
        metavar="SITE=BITS",
        help="bit-width of one quantizer; any number of times",
    )
    price.add_argument(
        "--ledger", action="store_true", help="print what is priced by which row, too"
    )
    price.add_argument("--json", action="store_true", help="print JSON with exact amounts")
    price.set_defaults(run=_price)


# -- arguments -------------------------------------------------------------------------------------


def _site_bits(text: str) -> tuple[str, int]:
    site, equals, bits = text.rpartition("=")
    if not site or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not SITE=BITS, such as conv1_weight=4")
    return site, width(bits)


# -- actions ---------------------------------------------------------------------------------------


def _list(arguments: argparse.Namespace) -> int:
    from cgmq_fx.table_text import print_list

    print_list()
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from cgmq_fx.table_text import print_table

    print_table(_load(arguments.table))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    table = _load(Path(arguments.table), strict=arguments.strict)
    rows = "1 row" if len(table.rows) == 1 else f"{len(table.rows)} rows"
    print(f"{arguments.table}: sound; table {table.name!r} in {table.unit}, {rows}")
    print(f"sha256 {table.digest}")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from cgmq_fx.cost.schema import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from cgmq_fx.table_diff import difference

    try:
        first, second = _load(arguments.first), _load(arguments.second)
    except CgmqError as error:
        print(f"cgmq-fx: {error}", file=sys.stderr)
        return EXIT_TROUBLE
    found = difference(first, second)
    if not found:
        print(f"{arguments.first} and {arguments.second} say the same")
        return 0
    print("\n".join(found))
    return EXIT_DIFFERENT


def _price(arguments: argparse.Namespace) -> int:
    from cgmq_fx.price_model import load_model, price_model

    priced = price_model(
        load_model(arguments.model),
        _load(arguments.table),
        arguments.shapes,
        weights=arguments.weights,
        activations=arguments.activations,
        bits=dict(arguments.bits),
    )
    if arguments.json:
        both = {"report": json.loads(priced.report.to_json())}
        if arguments.ledger:
            both["ledger"] = json.loads(priced.ledger.to_json())
        print(json.dumps(both if arguments.ledger else both["report"], indent=2))
        return 0
    print(priced.report)
    if arguments.ledger:
        print(f"\n{priced.ledger}")
    for note in priced.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _load(source: str | Path, *, strict: bool = False) -> "CostTable":
    """Return a table; what is doubtful about it goes to stderr."""
    from cgmq_fx.cost.load import load_table

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            table = load_table(source, strict=strict)
        except OSError as error:  # such as a path that is too long
            raise CostTableError(f"cost table {source} cannot be read: {error}") from error
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return table
