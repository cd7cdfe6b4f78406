"""The front end of `torch.export`: the graph form of the first, for models that it cannot trace."""

import copy
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from cgmq_fx.errors import UnsupportedModelError, UsageError
from cgmq_fx.lower import lower
from cgmq_fx.passes import align_modes, shape_guard
from cgmq_fx.passes.meta import WORK
from cgmq_fx.prepare import prepare
from cgmq_fx.report import report
from cgmq_fx.testing import exported_programs
from cgmq_fx.testing.compare import positional_inputs
from export_checks import assert_equal, assert_like_model, exported, run, with_batch
from graph_zoo import ZOO, DropPath, case

THIS_FILE = __file__
X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("zoo_case", ZOO, ids=lambda item: item.id)
def test_zoo(zoo_case):
    model, inputs = zoo_case.build()
    prepared = exported(model, inputs, batch_axis=zoo_case.batch_axis)
    assert prepared.plan.settings.front_end == "export"
    assert_like_model(model, prepared, inputs, (1, 5), zoo_case.batch_axis)
    traced = prepare(model, "100%", example_inputs=inputs, batch_axis=zoo_case.batch_axis)
    assert work_of(traced) == work_of(prepared), "the front ends differ in what is priced"


def work_of(prepared: Any) -> tuple[int, int]:
    rows = [work for node in prepared.graph.nodes for work in WORK.find(node) or ()]
    return sum(work.macs for work in rows), len(prepared.quantizers)


@settings(max_examples=4)
@given(exported_programs())
def test_generated_models(drawn):
    model = drawn.model()
    inputs = positional_inputs(model, *drawn.inputs(), **drawn.kwargs())
    assert_like_model(model, exported(model, inputs), inputs, (5,))


# -- which front end ---------------------------------------------------------------------------


class Particular(nn.Module):
    """Asks for the layout of its input, which symbolic tracing cannot answer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Return logits."""
        if x.layout is not torch.strided:
            raise TypeError("it must be dense")
        return self.linear(x) * scale


class DecidedByData(nn.Module):
    """Asks for the sign of a sum."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` or its negative."""
        return x if x.sum() > 0 else -x


def test_auto_traces_where_it_can_and_exports_where_it_cannot():
    plain, inputs = case("plain").build()
    used = [
        prepare(model, "100%", example_inputs=given).plan.settings.front_end
        for model, given in ((plain, inputs), (Particular(), (X,)))
    ]
    assert used == ["fx", "export"]
    with pytest.raises(UnsupportedModelError, match="it must be dense"):
        prepare(Particular(), "100%", example_inputs=(X,), front_end="fx")


def test_auto_without_inputs_says_that_export_needs_them():
    with pytest.raises(UnsupportedModelError, match=r"it must be dense(.|\n)*torch.export"):
        prepare(Particular(), "100%")


def test_both_reasons_stand_in_one_error():
    with pytest.raises(UnsupportedModelError) as caught:
        prepare(DecidedByData(), "100%", example_inputs=(X,))
    text = str(caught.value)
    assert "front_end='fx'" in text
    assert "front_end='export'" in text
    assert text.count(THIS_FILE) >= 2
    assert "Ways out" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"front_end": "export"}, "needs|there are none"),
        ({"front_end": "onnx", "example_inputs": (X,)}, "'onnx'"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(UsageError, match=message):
        prepare(Particular(), "100%", **options)


class Talking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        print("from the model", file=sys.stderr)
        return x + 1 if x.sum() > 0 else x


def test_a_refusal_prints_nothing_but_what_the_model_prints(capsys):
    with pytest.raises(UnsupportedModelError, match=r"in forward: return x \+ 1") as caught:
        prepare(Talking(), "100%", example_inputs=(X,), front_end="export")
    printed = capsys.readouterr()
    assert set(printed.err.splitlines()) == {"from the model"}
    assert printed.out == ""
    assert "Caused by" not in str(caught.value)


def test_an_exported_program_is_refused_with_the_way_out():
    program = torch.export.export(Particular(), (X,), strict=False)
    with pytest.raises(UsageError, match=r"ExportedProgram(.|\n)*float model"):
        prepare(program, "100%", example_inputs=(X,))


# -- inputs and outputs ------------------------------------------------------------------------


@dataclass
class Pair:
    left: Tensor
    label: str
    right: Any = None


class Structures(nn.Module):
    """Takes and returns containers and objects."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(
        self, batch: dict[str, Any], pair: Pair, flag: bool = True, *, gain: float = 2.0
    ) -> dict[str, Any]:
        """Return a dict with an object, a constant and a number that the batch decides."""
        x = self.linear(batch["x"]) + pair.left * gain + batch["more"][0]
        x = x if flag else -x
        return {"pair": Pair(x, pair.label), "rows": x.shape[0] * 2, "none": (None, [x.mean(1)])}


def structured() -> dict[str, Any]:
    pair = Pair(torch.randn(2, 6), "name")
    return {"batch": {"x": X.clone(), "more": [torch.randn(2, 6)]}, "pair": pair}


def test_containers_and_objects_come_in_and_go_out():
    model, inputs = Structures(), structured()
    prepared = exported(model, inputs)
    ours, theirs = (run(module, inputs, training=True)[0] for module in (model, prepared))
    assert isinstance(theirs["pair"], Pair)
    assert_equal(vars(ours.pop("pair")), vars(theirs.pop("pair")))
    assert_equal(ours, theirs)
    with pytest.raises(UnsupportedModelError, match=r"'pair'(.|\n)*other"):
        prepared(inputs["batch"], Pair(X, "other"))
    with pytest.raises(UnsupportedModelError, match=r"input 'gain'(.|\n)*3.0"):
        prepared(**inputs, gain=3.0)


def test_defaults_and_the_order_of_inputs_stay():
    prepared = exported(Particular(), (X,))
    assert [(n.target, n.args) for n in prepared.graph.nodes if n.op == "placeholder"] == [
        ("x", ()),
        ("scale", (1.0,)),
    ]


# -- shapes ------------------------------------------------------------------------------------


class EvenRows(nn.Module):
    """Pairs samples, so that the batch must be even."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch / 2, 3)``."""
        return self.linear(x.reshape(-1, 12) if x.shape[0] % 2 == 0 else x.repeat(1, 2))


class FixedRows(nn.Module):
    """Works on its whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(3, 4)``."""
        return self.linear(x.view(4, 6)).t()


def test_a_batch_that_takes_another_path_is_refused():
    model, inputs = EvenRows(), (with_batch((X,), 4)[0],)
    prepared = exported(model, inputs)
    assert_like_model(model, prepared, inputs, (6, 8))
    with pytest.raises(UnsupportedModelError, match=r"'x' \(3, 6\)(.|\n)*example_inputs"):
        prepared(torch.randn(3, 6))


def test_without_the_guard_the_graph_would_go_wrong(monkeypatch):
    prepared = exported(EvenRows(), (with_batch((X,), 4)[0],))
    monkeypatch.setattr(shape_guard.ShapeGuard, "forward", lambda self, *tensors: None)
    with pytest.raises(RuntimeError, match="invalid for input of size 18"):
        prepared(torch.randn(3, 6))


def test_a_model_of_one_batch_is_priced_for_it_and_refuses_others():
    model, inputs = FixedRows(), (torch.randn(4, 6),)
    prepared = exported(model, inputs)
    assert prepared.plan.settings.batch_axis is None
    assert report(prepared).rows[0].macs == 4 * 6 * 3
    assert_like_model(model, prepared, inputs)
    with pytest.raises(UnsupportedModelError, match=r"\(2, 6\)(.|\n)*\(4, 6\)"):
        prepared(X)


def test_other_axes_are_fixed():
    prepared = exported(Particular(), (X,))
    with pytest.raises(UnsupportedModelError, match=r"\(2, 7\)(.|\n)*\(any, 6\)"):
        prepared(torch.randn(2, 7))


# -- modes and state ---------------------------------------------------------------------------


class Averages(nn.Module):
    """Buffers that training alone changes, a buffer that is assigned, and constants."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("shift", torch.ones(6), persistent=False)
        self.plain = torch.full((6,), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.linear(x) + self.shift + self.plain + torch.tensor([1.0, 2, 3, 4, 5, 6])
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            x = F.dropout(x, 0.5)
        self.count = self.count + 1
        return x - self.mean


def test_buffers_change_in_the_mode_in_which_the_model_changes_them():
    model = Averages()
    prepared = exported(model, (X,))
    assert_like_model(model, prepared, (X,), (1, 5))
    assert set(prepared.state_dict()) >= set(model.state_dict())
    assert not [key for key in prepared.state_dict() if key.startswith("exported")]


class Mixed(nn.Module):
    """Random paths, in-place dropout, functional norms and a skipped layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6, momentum=None)
        self.path, self.drop = DropPath(), nn.Dropout(0.3, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, 6)``."""
        x = x + self.path(self.first(x))
        x = self.drop(self.norm(x)).relu_()
        if torch.rand([]) < 0.0:
            return x
        weight, mean = torch.ones(6), torch.zeros(6)
        x = F.batch_norm(x, mean, torch.ones(6), weight, training=self.training)
        with torch.no_grad():
            gate = torch.sigmoid(self.second(x))
        return self.norm(x * gate) if self.training else self.norm(x * gate) * 2


def test_layers_and_branches_follow_the_mode():
    model = Mixed()
    prepared = exported(model, (X,))
    assert_like_model(model, prepared, (X,), (3,))
    norms = [n for n in prepared.graph.nodes if n.op == "call_module" and n.target == "norm"]
    assert len(norms) == 2


def test_a_region_without_gradient_has_none():
    model = Mixed().train()
    prepared = exported(model, (X,)).train()
    for module in (model, prepared):
        torch.manual_seed(0)
        module(X).square().sum().backward()
    assert prepared.get_parameter("second.weight").grad is None
    assert_equal(model.first.weight.grad, prepared.get_parameter("first.weight").grad)


def test_a_merge_that_forgets_evaluation_is_seen(monkeypatch):
    monkeypatch.setattr(align_modes._Alignment, "_merged", lambda self, ours, theirs: ours)
    model = Mixed()
    with pytest.raises((AssertionError, UnsupportedModelError)):
        assert_like_model(model, exported(model, (X,)), (X,))


class OnlyInEvaluation(nn.Module):
    """Calls a layer with state in evaluation alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, 6)``."""
        return x if self.training else self.norm(x)


def test_state_that_evaluation_alone_uses_is_refused():
    with pytest.raises(UnsupportedModelError, match="only in evaluation mode"):
        exported(OnlyInEvaluation(), (X,))


def test_a_recurrent_layer_is_opened():
    model, inputs = case("recurrent").build()
    prepared = exported(model, inputs)
    (group,) = report(prepared).coverage.groups("quantized")
    assert group.macs == 5 * 2 * (16 * 7 + 16 * 12) + 16
    assert {"cell_hidden_l0", "cell_input_l1", "cell_hidden_l1_reverse"} <= {*prepared.quantizers}


def test_lowering():
    model, inputs = case("residual").build()
    prepared = exported(model.eval(), inputs).eval()
    expected = prepared(*inputs)
    prepared.plan.steps += 1
    fixed = lower(prepared)
    torch.testing.assert_close(fixed(*inputs), expected, rtol=1e-5, atol=1e-5)
    assert fixed(*with_batch(inputs, 5)).shape[0] == 5


def test_copies_stand_alone():
    model = Structures()
    inputs = structured()
    prepared = exported(model, inputs)
    twin = copy.deepcopy(prepared)
    with torch.no_grad():
        prepared.get_parameter("linear.weight").zero_()
    assert_equal(
        vars(run(twin, inputs, training=False)[0]["pair"]),
        vars(run(model, inputs, training=False)[0]["pair"]),
    )


# -- models of libraries -----------------------------------------------------------------------


def small_bert(transformers: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        vocab_size=20, max_position_embeddings=8,
    )  # fmt: skip
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    return transformers.BertModel(config), {
        "input_ids": torch.randint(3, 20, (2, 5)),
        "attention_mask": mask,
    }


def small_encoder_decoder(transformers: Any) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.T5Config(
        d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20
    )
    tokens = torch.randint(3, 20, (2, 5))
    return transformers.T5Model(config), {
        "input_ids": tokens,
        "decoder_input_ids": tokens[:, :3].clone(),
        "use_cache": False,
    }


@pytest.mark.parametrize(
    "make", [small_bert, small_encoder_decoder], ids=lambda item: item.__name__
)
def test_language_models(make):
    pytest.importorskip("torchvision_shim")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, inputs = make(transformers)
    prepared = exported(model, inputs)
    assert_like_model(model, prepared, inputs, (1, 5))
    assert type(prepared(**inputs)) is type(model(**inputs))
