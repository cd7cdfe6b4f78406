"""Peak activation memory: figures worked by hand, what is stored at which width, bad arguments."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cgmq_fx.cost.peak_memory import Buffer, PeakMemory
from cgmq_fx.errors import BudgetError, UsageError
from cgmq_fx.prepare import prepare
from cgmq_fx.report import report
from graph_zoo import Calls, TiedLanguageModel
from memory_models import ResNet20, UNet, lenet5

NAME = "peak_activation_memory"


def peak(model, shape, *, input_bits=False):
    prepared = prepare(
        model,
        {NAME: "1 GiB"},
        example_inputs=(torch.randn(2, *shape),),
        learn_input_bits=input_bits,
    )
    return prepared.plan.accounting


def at(accounting, width):
    """Return the peak in bytes with every learned site at one width."""
    bits = [width if site.learned else site.allowed[0] for site in accounting.sites]
    return accounting.totals(bits)[NAME]


def sizes(accounting):
    return {buffer.name: buffer for buffer in accounting.resources[NAME].buffers}


def test_lenet5():
    # Feature maps: 1*28*28 = 784, 6*28*28 = 4704, 6*14*14 = 1176, 16*10*10 = 1600, 16*5*5 = 400,
    # 120, 84, 10. A ReLU runs in place. The steps hold, in elements:
    #   conv 784 + 4704 = 5488      pool 4704 + 1176 = 5880 (the peak)      conv 1176 + 1600 = 2776
    #   pool 1600 + 400 = 2000      linear 400 + 120, 120 + 84, 84 + 10
    # In float: 5880 * 4 = 23 520 bytes. Both tensors of the peak are held as the codes that the
    # second convolution reads: at 8 bits 5880 bytes, at 2 bits 1470. Then the first step is less:
    # 784 * 8 bits (the input arrives with 8) + 4704 * 2 bits = 15 680 bits = 1960 bytes: the peak.
    accounting = peak(lenet5(), (1, 28, 28))
    assert accounting.resources[NAME].reference == 23_520
    assert at(accounting, 32) == 23_520
    assert at(accounting, 8) == 5_880
    assert at(accounting, 4) == max(Fraction(5880 * 4, 8), Fraction(784 * 8 + 4704 * 4, 8))
    assert at(accounting, 2) == 1_960


def test_resnet20():
    # The first stage holds maps of 16*32*32 = 16 384 elements. Its blocks hold the block's input
    # (for the sum), and each convolution its input and output: in the second convolution the
    # block's input + what the first made + the result = 3 * 16 384 = 49 152 elements; the sum holds
    # both addends and the result, as many. Later stages hold less: the first block of stage two
    # 16 384 + 2 * 8192 = 32 768. In float 49 152 * 4 = 196 608 bytes; at 8 bits a quarter of that,
    # since every map is read through quantizers only: 49 152 bytes; at 2 bits 12 288.
    accounting = peak(ResNet20(), (3, 32, 32))
    assert accounting.resources[NAME].reference == 196_608
    assert at(accounting, 32) == 196_608
    assert at(accounting, 8) == 49_152
    assert at(accounting, 2) == 12_288


def test_u_net():
    # Maps: input 3*256 = 768; first 8*256 = 2048, kept for the last concatenation; pooled 8*64 =
    # 512; second 16*64 = 1024, kept too; pooled 16*16 = 256; bottom 32*16 = 512; up 16*64 = 1024;
    # joined 32*64 = 2048; after it 16*64 = 1024; up 8*256 = 2048; joined 16*256 = 4096; after it
    # 8*256 = 2048; last 2*256 = 512. The steps hold, in elements:
    #   down1 768 + 2048 = 2816              pool 2048 + 512 = 2560
    #   down2 2048 + 512 + 1024 = 3584       pool 2048 + 1024 + 256 = 3328
    #   bottom 3072 + 256 + 512 = 3840       up2 3072 + 512 + 1024 = 4608
    #   cat 2048 + 1024 + 1024 + 2048 = 6144 join2 2048 + 2048 + 1024 = 5120
    #   up1 2048 + 1024 + 2048 = 5120        cat 2048 + 2048 + 4096 = 8192 (the peak)
    #   join1 4096 + 2048 = 6144             last 2048 + 512 = 2560
    # In float 8192 * 4 = 32 768 bytes; at 4 bits 4096.
    accounting = peak(UNet(), (3, 16, 16))
    assert accounting.resources[NAME].reference == 32_768
    assert at(accounting, 32) == 32_768
    assert at(accounting, 8) == 8_192
    assert at(accounting, 4) == 4_096
    # At 2 bits the concatenation holds 2048 bytes, and the last step more: 2048 * 2 bits and 512
    # logits in float are 512 + 2048 = 2560 bytes.
    assert at(accounting, 2) == 2_560


def test_a_tensor_that_is_returned_stays_float_beside_its_codes():
    model = Calls(lambda m, x: (y := m.first(x), m.second(y)), first=nn.Linear(4, 6),
                  second=nn.Linear(6, 2))  # fmt: skip
    found = sizes(peak(model, (4,)))
    assert found["linear"].site is None
    assert found["quantizers_linear"].is_copy
    # Float: the first layer holds 4 + 6 elements. At 2 bits the second one holds 6 in float and as
    # a copy, and 2.
    accounting = peak(model, (4,))
    assert accounting.resources[NAME].reference == 40
    assert at(accounting, 2) == 6 * 4 + Fraction(6 * 2, 8) + 2 * 4


def test_what_is_written_in_place_and_read_under_its_older_name_stays_float():
    def forward(m, x):
        y = m.first(x)
        z = m.second(y)
        y.mul_(0.5)
        return m.second(y) + z

    model = Calls(forward, first=nn.Linear(4, 4), second=nn.Linear(4, 4))
    found = sizes(peak(model, (4,)))
    assert found["linear"].site is None
    assert sum(buffer.is_copy for buffer in found.values()) == 2  # its value before and after


def test_reshapes_and_batch_norm_and_relu_add_no_buffer():
    model = nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(), nn.Flatten()),
        nn.Linear(2 * 4 * 4, 3),
    )
    accounting = peak(model, (1, 6, 6))
    assert [b.elements for b in accounting.resources[NAME].buffers] == [36, 32, 3]


def test_padding_and_pooling_are_held_as_what_reads_them():
    model = Calls(
        lambda m, x: m.last(F.max_pool2d(F.pad(m.first(x), (1, 1, 1, 1), "circular"), 2)),
        first=nn.Conv2d(1, 2, 3),
        last=nn.Conv2d(2, 1, 1),
    )
    buffers = peak(model, (1, 6, 6)).resources[NAME].buffers
    assert [b.elements for b in buffers] == [36, 32, 72, 18, 9]
    assert len({b.site for b in buffers[1:4]}) == 1
    assert buffers[1].site is not None


def test_tokens_have_the_bits_of_their_type():
    prepared = prepare(
        TiedLanguageModel(), {NAME: "1 GiB"}, example_inputs=(torch.randint(11, (2, 4)),)
    )
    tokens = prepared.plan.accounting.resources[NAME].buffers[0]
    assert (tokens.elements, tokens.bits, tokens.site) == (4, 64, None)


def test_without_a_bound_on_it_nothing_more_is_quantized():
    x = torch.randn(2, 3, 32, 32)
    plain = prepare(ResNet20(), "50%", example_inputs=(x,))
    assert NAME not in plain.plan.accounting.resources
    bounded = prepare(ResNet20(), {"bops": "50%", NAME: "50%"}, example_inputs=(x,))
    assert len(bounded.bit_widths) > len(plain.bit_widths)


def test_a_prepared_network_computes_what_the_model_does_at_32_bits():
    torch.manual_seed(0)
    for model, shape in ((ResNet20(), (3, 32, 32)), (UNet(), (3, 16, 16))):
        x = torch.randn(2, *shape)
        model.eval()
        prepared = prepare(model, {NAME: "1 GiB"}, example_inputs=(x,), learn_input_bits=True)
        assert torch.equal(prepared.eval()(x), model(x))


def test_the_floor_names_the_tensors_of_the_peak_and_a_feasible_figure():
    x = torch.randn(2, 1, 28, 28)
    with pytest.raises(BudgetError) as caught:
        prepare(lenet5(), {NAME: "1 KiB"}, example_inputs=(x,))
    assert caught.value.floors == {NAME: 1960}
    assert caught.value.feasible == {NAME: 1960}
    assert "conv2d" in str(caught.value)
    prepare(lenet5(), {NAME: "1960 byte"}, example_inputs=(x,))


def test_the_report_shows_what_is_live_at_the_peak():
    prepared = prepare(
        lenet5(), {"bops": "100%", NAME: "24 KiB"}, example_inputs=(torch.randn(2, 1, 28, 28),)
    )
    found = report(prepared)
    rows = [row for row in found.tensors if row.role == "activation"]
    assert [(row.elements, row.bits) for row in rows] == [(4704, 32), (1176, 32)]
    assert sum(row.cost[NAME] for row in rows) == found.totals[NAME] == 23_520
    assert "live at the peak" in str(found)
    assert NAME in found.to_json()
    assert f"cost_{NAME}" in found.to_csv()


def test_widths_are_checked():
    resource = PeakMemory([Buffer("a", 3, 0, 1, 0)], 1, (2, 8))
    with pytest.raises(UsageError, match="1 sites"):
        resource.total([0, 0])
    with pytest.raises(UsageError, match="no allowed"):
        resource.floor([()])
    with pytest.raises(UsageError, match="5"):
        resource.floor([(5,)])
    assert PeakMemory([], 0, (2, 8)).total([]) == 0
    assert PeakMemory([], 0, (2, 8)).costs([]) == []
