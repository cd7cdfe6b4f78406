"""The built-in tables: numbers as their sources print them, and what every table must have."""

import itertools
import random
from decimal import Decimal
from fractions import Fraction

import pytest

from cgmq_fx.cost.find import table_names
from cgmq_fx.cost.load import get_table, load_table
from cgmq_fx.cost.operation import PAIR_CLASSES, Operation
from cgmq_fx.cost.row import Row
from cgmq_fx.cost.table import CostTable
from cgmq_fx.cost.totals import price
from cgmq_fx.errors import CostTableError
from cgmq_fx.units import parse_unit
from cost_cases import LENET_MACS, WIDTHS, conv, lenet, linear, matmul, plain

TABLES = pytest.mark.parametrize("name", table_names())

CONV, LINEAR, MATMUL = conv(), linear(), matmul()
POINTWISE = conv(kernel_size=1, kernel_0=1, kernel_1=1)
DEPTHWISE = conv(groups=8, out_channels=8)
POINTWISE_DEPTHWISE = conv(groups=8, out_channels=8, kernel_size=1, kernel_0=1, kernel_1=1)
GROUPED = conv(groups=2)
OPAQUE = plain("opaque", "opaque", macs=1000)

# google/qkeras, process "horowitz": energy in pJ of a multiplication, weight (down) by activation.
QKERAS_WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16)
QKERAS_MULTIPLY = """
    0.01406 0.02052 0.02690 0.03324 0.03955 0.04582 0.05208 0.10173
    0.02052 0.03008 0.03955 0.04896 0.05833 0.06766 0.07698 0.15097
    0.02690 0.03955 0.05208 0.06455 0.07698 0.08937 0.10173 0.20000
    0.03324 0.04896 0.06455 0.08008 0.09555 0.11098 0.12638 0.24890
    0.03955 0.05833 0.07698 0.09555 0.11406 0.13253 0.15097 0.29771
    0.04582 0.06766 0.08937 0.11098 0.13253 0.15404 0.17550 0.34644
    0.05208 0.07698 0.10173 0.12638 0.15097 0.17550 0.20000 0.39512
    0.10173 0.15097 0.20000 0.24890 0.29771 0.34644 0.39512 0.78333
"""
# Horowitz, pJ at 45 nm and 0.9 V.
INT8_MULTIPLY, INT32_ADD = Fraction("0.2"), Fraction("0.1")
FLOAT32_MULTIPLY, FLOAT32_ADD = Fraction("3.7"), Fraction("0.9")

# eml-eda/plinio, MACs per cycle of MPIC by activation, then weight bits.
MPIC = {
    2: {2: "6.5", 4: "4.0", 8: "2.2"},
    4: {2: "3.9", 4: "3.5", 8: "2.1"},
    8: {2: "2.5", 4: "2.3", 8: "2.1"},
}
# act-lab.org/artifacts/bitfusion: products in a Fusion Unit at once, by weight and activation bits.
FUSED = {
    (8, 8): 1, (8, 4): 2, (4, 8): 2, (8, 2): 4, (4, 4): 4, (2, 8): 4, (4, 2): 8, (2, 4): 8,
    (2, 2): 16,
}  # fmt: skip

Costs = dict[tuple[int, int], Fraction]


def qkeras() -> Costs:
    lines = [line.split() for line in QKERAS_MULTIPLY.split("\n") if line.strip()]
    return {
        (weight, activation): Fraction(number) + INT32_ADD
        for weight, line in zip(QKERAS_WIDTHS, lines, strict=True)
        for activation, number in zip(QKERAS_WIDTHS, line, strict=True)
    }


def products(*widths: int) -> Costs:
    return {(w, a): Fraction(w * a) for w, a in itertools.product(widths, repeat=2)}


def equal(**costs: Fraction) -> Costs:
    return {(int(width[1:]),) * 2: cost for width, cost in costs.items()}


ENERGY = qkeras() | {(32, 32): FLOAT32_MULTIPLY + FLOAT32_ADD}
CYCLES = {(w, a): 1 / Fraction(MPIC[a][w]) for a in MPIC for w in MPIC[a]}
SERIAL = products(*range(1, 9))
FUSION = {pair: Fraction(1, together) for pair, together in FUSED.items()}
# Two 512-bit units: an instruction multiplies 64 pairs of bytes or 16 of float32.
VNNI = equal(_8=Fraction(1, 2 * 64), _32=Fraction(1, 2 * 16))
# Two operations per MAC; peak rates in 10^12 operations per second make picoseconds.
T4 = equal(_4=2 / Fraction(260), _8=2 / Fraction(130), _32=2 / Fraction("8.1"))
A100 = equal(_4=2 / Fraction(1248), _8=2 / Fraction(624), _32=2 / Fraction("19.5"))
SEVERAL = (2, 3, 4, 8, 16, 32)

#: For each table the operations that it prices, and what a MAC of each costs at each pair of
#: widths: for a grid all pairs that it lists.
PRICES: dict[str, list[tuple[Operation, Costs]]] = {
    "bops": [(op, products(*SEVERAL)) for op in (CONV, DEPTHWISE, GROUPED, LINEAR, MATMUL)],
    "macs": [
        (op, dict.fromkeys(products(*SEVERAL), Fraction(1)))
        for op in (CONV, DEPTHWISE, GROUPED, LINEAR, MATMUL)
    ],
    "energy_45nm": [(op, ENERGY) for op in (CONV, DEPTHWISE, GROUPED, LINEAR, MATMUL)],
    "mpic": [(op, CYCLES) for op in (CONV, DEPTHWISE, GROUPED, LINEAR)],
    # CPU clocks and MACs of all layers of a kind, summed.
    "cortex_m7": [
        (CONV, equal(_8=Fraction(5_336_698, 1_382_400))),
        (POINTWISE, equal(_8=Fraction(34_426_341, 17_203_200))),
        (DEPTHWISE, equal(_8=Fraction(25_311_690, 2_217_600))),
        (POINTWISE_DEPTHWISE, equal(_8=Fraction(25_311_690, 2_217_600))),
        (LINEAR, equal(_8=Fraction(682_141, 256_000))),
    ],
    "bit_serial": [(op, SERIAL) for op in (CONV, LINEAR, MATMUL)],
    "bit_fusion": [(op, FUSION) for op in (CONV, LINEAR)],
    "vnni": [(op, VNNI) for op in (CONV, LINEAR, MATMUL)],
    "t4_tensor_core": [(op, T4) for op in (CONV, LINEAR, MATMUL)],
    "a100_tensor_core": [(op, A100) for op in (CONV, LINEAR, MATMUL)],
}
UNITS = {
    **dict.fromkeys(("mpic", "cortex_m7", "bit_serial", "bit_fusion", "vnni"), "cycle"),
    **dict.fromkeys(("t4_tensor_core", "a100_tensor_core"), "ps"),
    **{"bops": "BOP", "macs": "MAC", "energy_45nm": "pJ"},
}
#: What the sources do not cover, and the tables therefore refuse.
REFUSED = {
    "mpic": [MATMUL, OPAQUE],
    "cortex_m7": [GROUPED, MATMUL, OPAQUE],
    "bit_fusion": [DEPTHWISE, GROUPED, MATMUL, OPAQUE],
    **{
        name: [DEPTHWISE, GROUPED, OPAQUE]
        for name in ("bit_serial", "vnni", "t4_tensor_core", "a100_tensor_core")
    },
}


def of_class(op: str) -> Operation:
    """An operation of a class, without attributes: for rows that are asked directly."""
    return Operation(op, op, f"torch.{op}", "pair" if op in PAIR_CLASSES else "weight", 1, 1, 1)


def priced_by(table: CostTable, row: Row) -> list[Operation]:
    return [op for op, _ in PRICES[table.name] if table.row_for(op) == row]


def test_every_table_has_its_numbers_here():
    assert set(PRICES) == set(UNITS) == set(table_names())


@TABLES
def test_numbers_are_those_of_the_source(name):
    table = get_table(name)
    for operation, costs in PRICES[name]:
        found = {pair: table.cost(operation, pair) / operation.macs for pair in costs}
        assert found == costs, operation


@TABLES
def test_no_other_number_stands_in_a_table(name):
    table = get_table(name)
    for row in table.rows:
        if row.grid is None:
            continue
        operations = priced_by(table, row)
        assert operations, f"no operation here is priced by {row}"
        listed = {(entry.first, entry.second): entry.cost for entry in row.grid.entries}
        for operation, costs in PRICES[name]:
            if operation in operations:
                assert listed == costs


@pytest.mark.parametrize(
    ("name", "cost"),
    [("bops", 32 * 32), ("macs", 1), ("energy_45nm", FLOAT32_MULTIPLY + FLOAT32_ADD)],
)
def test_what_cannot_be_opened_runs_in_float(name, cost):
    table = get_table(name)
    assert table.cost(OPAQUE) == table.reference_cost(OPAQUE) == cost * OPAQUE.macs
    assert table.row_for(OPAQUE).op != table.row_for(CONV).op


@TABLES
def test_unit_and_sources(name):
    table = get_table(name)
    assert table.unit == UNITS[name] == parse_unit(table.unit).symbol
    assert table.name == name
    assert table.source
    assert table.unpriced == "error", "what a source does not cover is refused, never free"
    if name not in ("bops", "macs"):
        assert all(row.source for row in table.rows)


@TABLES
def test_wider_never_costs_less(name):
    for row in get_table(name).rows:
        operation = of_class(row.op[0])
        widest = row.grid.widest() if row.grid else None
        firsts = range(1, widest.first + 1 if widest else 33)
        seconds = range(1, widest.second + 1 if widest else 33)
        for first, second in itertools.product(firsts, seconds):
            here = row.unit_cost(operation, (first, second))
            for wider in ((first + 1, second), (first, second + 1)):
                there = row.unit_cost(operation, wider)
                assert there is None or here <= there, (row, first, second)


@TABLES
def test_every_allowed_pair_is_priced(name):
    for row in get_table(name).rows:
        first, second = (row.grid.widths(0), row.grid.widths(1)) if row.grid else (SEVERAL, SEVERAL)
        for op, pair in itertools.product(row.op, itertools.product(first, second)):
            assert row.unit_cost(of_class(op), pair) > 0, (op, pair)


@TABLES
def test_the_reference_is_a_width_of_the_hardware(name):
    table = get_table(name)
    reference = table.reference.weight, table.reference.activation
    for operation, costs in PRICES[name]:
        assert reference in costs
        assert table.reference_cost(operation) == costs[reference] * operation.macs
        assert max(costs.values()) == costs[reference], "nothing costs more than 100 %"


@TABLES
def test_digest_is_of_the_content(name):
    table = get_table(name)
    content = table.to_json()
    random.Random(0).shuffle(content["row"])
    for row in content["row"]:
        random.Random(1).shuffle(row.get("grid", []))
    assert load_table(content, strict=True).digest == table.digest
    content["row"][0]["source"] = "another"
    assert load_table(content).digest != table.digest


@pytest.mark.parametrize(
    ("name", "operation"),
    [(name, operation) for name, refused in REFUSED.items() for operation in refused],
)
def test_what_a_source_does_not_cover_is_refused(name, operation):
    table = get_table(name)
    with pytest.raises(CostTableError, match=f"cost table '{name}' has no row for 1 operation"):
        table.require_priced([operation])


def test_a_table_of_your_own_adds_what_a_source_does_not_cover():
    depthwise = {"op": "conv2d", "where": "groups > 1", "per": "mac", "cost": "1/16"}
    own = load_table({"name": "own", "include": ["vnni"], "row": [depthwise]})
    assert own.cost(DEPTHWISE, (8, 8)) == Fraction(DEPTHWISE.macs, 16)
    assert own.cost(CONV, (8, 8)) == get_table("vnni").cost(CONV, (8, 8))
    assert own.unit == "cycle"


@pytest.mark.parametrize(
    ("name", "pair", "lane"),
    [
        ("bit_fusion", (3, 3), (4, 4)),
        ("bit_fusion", (5, 2), (8, 2)),
        ("bit_fusion", (2, 7), (2, 8)),
        ("vnni", (2, 4), (8, 8)),
        ("vnni", (8, 16), (32, 32)),
        ("a100_tensor_core", (4, 8), (8, 8)),
        ("t4_tensor_core", (2, 2), (4, 4)),
        ("t4_tensor_core", (16, 16), (32, 32)),
        ("energy_45nm", (12, 12), (16, 16)),
        ("energy_45nm", (2, 32), (32, 32)),
        ("cortex_m7", (2, 4), (8, 8)),
    ],
)
def test_a_narrow_pair_costs_what_its_lane_does(name, pair, lane):
    table = get_table(name)
    assert table.cost(LINEAR, pair) == table.cost(LINEAR, lane)


def test_the_interpolated_energies_follow_the_rule():
    """QKeras: b = sqrt(weight bits x activation bits), then a polynomial through Horowitz' points.

    It goes through 0.2 pJ at 8 bits and 3.1 pJ at 32 bits:
    0.002994791667 * 64 + 0.001041666667 * 8 = 0.2 and 0.002994791667 * 1024 + ... * 32 = 3.1.
    """
    square, first = Decimal("0.002994791667"), Decimal("0.001041666667")
    for width, multiply in ((8, "0.2"), (32, "3.1")):
        assert abs(square * width**2 + first * width - Decimal(multiply)) < Decimal("1e-8")
    for weight, activation in itertools.product(QKERAS_WIDTHS, repeat=2):
        bits = Decimal(weight * activation).sqrt()
        energy = Fraction(square * bits**2 + first * bits) + INT32_ADD
        cost = get_table("energy_45nm").cost(linear(macs=1), (weight, activation))
        assert abs(cost - energy) <= Fraction("0.0000051")
    assert get_table("energy_45nm").cost(linear(macs=1), (8, 8)) == INT8_MULTIPLY + INT32_ADD


def test_errors_are_the_farthest_single_layer():
    table = get_table("cortex_m7")
    for operation, average, lowest, highest in (
        (POINTWISE, "2.001", "1.774", "3.948"),
        (DEPTHWISE, "11.414", "9.821", "14.872"),
    ):
        row = table.row_for(operation)
        mean = table.cost(operation, (8, 8)) / operation.macs
        assert abs(mean - Fraction(average)) < Fraction("0.0006")
        farthest = max(Fraction(highest) / mean - 1, 1 - Fraction(lowest) / mean)
        assert abs(row.grid.entries[0].error - farthest) < Fraction("0.001")


def test_energy_of_lenet():
    """Energy of LeNet-5, worked by hand; the image has 8 bits whatever the activations have.

    MACs: 460,800 + 3,276,800 + 524,288 + 5,120 = 4,267,008; without the first layer 3,806,208.

    float32: 4,267,008 x 4.6 pJ                                  = 19,628,236.8 pJ
    8 / 8:   4,267,008 x (0.2 + 0.1) pJ                          =  1,280,102.4 pJ
    2 / 2:   first layer, 2-bit weights by the 8-bit image:
             b = sqrt(2 x 8) = 4,
             0.002994791667 x 16 + 0.001041666667 x 4 = 0.05208 pJ, + 0.1 pJ = 0.15208 pJ
             460,800 x 0.15208 pJ                                =     70,078.464 pJ
             others: b = 2,
             0.002994791667 x 4 + 0.001041666667 x 2 = 0.01406 pJ, + 0.1 pJ = 0.11406 pJ
             3,806,208 x 0.11406 pJ                              =    434,136.08448 pJ
             together                                            =    504,214.54848 pJ
    """
    assert sum(LENET_MACS) == 4_267_008
    resource = price(lenet(), get_table("energy_45nm"), 7, WIDTHS)
    assert resource.reference == Fraction("19628236.8")
    assert resource.total([WIDTHS.index(8)] * 7) == Fraction("1280102.4")
    assert resource.total([WIDTHS.index(2)] * 7) == Fraction("504214.54848")
