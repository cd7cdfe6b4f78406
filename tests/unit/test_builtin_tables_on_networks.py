"""The built-in tables on networks: widths of the hardware, budgets met, MACs as torch has them."""

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cgmq_fx.cost.find import table_names
from cgmq_fx.cost.load import get_table
from cgmq_fx.errors import BudgetError, CostTableError
from cgmq_fx.lower import lower
from cgmq_fx.prepare import prepare
from torchvision_shim import torchvision

models = torchvision.models

#: Widths of the default ones that each table leaves to learn, and a share of the reference that
#: needs more than one of them.
ALLOWED = {
    "bops": ({2, 4, 8, 16, 32}, "2%"),
    "macs": ({2, 4, 8, 16, 32}, "100%"),
    "energy_45nm": ({2, 4, 8, 16, 32}, "4%"),
    "mpic": ({2, 4, 8}, "70%"),
    "cortex_m7": ({8}, "100%"),
    "bit_serial": ({2, 4, 8}, "25%"),
    "bit_fusion": ({2, 4, 8}, "25%"),
    "vnni": ({8, 32}, "40%"),
    "t4_tensor_core": ({4, 8, 32}, "5%"),
    "a100_tensor_core": ({4, 8, 32}, "2.5%"),
}
WITH_DEPTHWISE = ("bops", "macs", "energy_45nm", "mpic", "cortex_m7")
INPUTS = (torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8),)


def network(*, depthwise: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *((nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()) if depthwise else ()),
        *(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 5)),
    )


def table_and_network():
    return [
        (name, depthwise)
        for name in table_names()
        for depthwise in ((False, True) if name in WITH_DEPTHWISE else (False,))
    ]


@pytest.mark.parametrize(("name", "depthwise"), table_and_network())
def test_only_widths_of_the_hardware_within_the_budget(name, depthwise):
    widths, share = ALLOWED[name]
    prepared = prepare(network(depthwise=depthwise), share, cost_table=name)
    prepared(*INPUTS)
    accounting = prepared.plan.accounting
    allowed = {site.name: set(site.allowed) for site in accounting.sites}
    assert all(found == widths for site, found in allowed.items() if site != "input_1")

    lowered = lower(prepared, allow_untrained=True)
    resource = accounting.resources[name]
    used = lowered.bit_widths
    assert all(width in allowed[site] for site, width in used.items())
    total = resource.total([resource.widths.index(width) for width in used.values()])
    assert total <= Fraction(share.rstrip("%")) / 100 * resource.reference
    costs = [
        get_table(name).cost(
            bound.operation, tuple(list(used.values())[source.site] for source in bound.sources)
        )
        for bound in accounting.operations
        if bound.sources
    ]
    assert sum(costs) == total, "each operation asked of the table by itself"


@pytest.mark.parametrize("name", sorted(set(table_names()) - set(WITH_DEPTHWISE)))
def test_depthwise_is_refused_where_no_source_covers_it(name):
    with pytest.raises(CostTableError) as error:
        prepare(network(depthwise=True), "100%", cost_table=name, example_inputs=INPUTS)
    message = str(error.value)
    assert (
        f"cost table {name!r} has no row for 1 operations with 1,152 MACs: '3' (conv2d" in message
    )
    assert "conv2d is priced where groups == 1" in message


def test_less_than_the_hardware_can_is_refused():
    with pytest.raises(BudgetError, match="is below the floor"):
        prepare(network(depthwise=False), "24%", cost_table="vnni", example_inputs=INPUTS)


@pytest.mark.parametrize(
    ("budget", "tables", "meant"),
    [
        ({"energy": "20 uJ"}, None, "energy_45nm"),
        ({"energy": "20 uJ"}, "mpic", "energy_45nm"),
        ({"cycles": "1 Mcycle"}, "mpic", "mpic"),
        ({"cycles": "1 Mcycle"}, ["bops", "vnni"], "vnni"),
        ({"cycles": "1 Mcycle"}, ["cortex_m7", "vnni"], "cortex_m7"),
        ({"latency": "1 ms"}, ["macs", "a100_tensor_core"], "a100_tensor_core"),
        ({"a100_tensor_core": "1 ms"}, None, "a100_tensor_core"),
    ],
)
def test_a_budget_finds_its_table(budget, tables, meant):
    prepared = prepare(network(depthwise=False), budget, cost_table=tables)
    assert set(prepared.plan.settings.limits) == {meant}


def test_an_alias_of_several_tables_lists_them():
    with pytest.raises(BudgetError) as error:
        prepare(network(depthwise=False), {"cycles": "1 Mcycle"})
    message = str(error.value)
    assert "'bit_fusion' and 'bit_serial' and 'cortex_m7' and 'mpic' and 'vnni' do" in message
    assert "name one table itself, or give it first in cost_table" in message


def transformer() -> nn.Module:
    return models.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=20,
        num_classes=7,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "side"),
    [
        (models.resnet18, 48),
        (models.mobilenet_v2, 40),
        (models.shufflenet_v2_x0_5, 48),
        (models.squeezenet1_1, 64),
        (models.regnet_y_400mf, 48),
        (transformer, 16),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_macs_are_half_the_operations_that_torch_counts(build, side):
    model = build().eval()
    image = torch.zeros(1, 3, side, side)
    counter = FlopCounterMode(display=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    prepared = prepare(model, "100%", cost_table="macs", example_inputs=(image,))
    resource = prepared.plan.accounting.resources["macs"]
    for width in (0, len(resource.widths) - 1):
        assert 2 * resource.total([width] * resource.num_sites) == counter.get_total_flops()
