"""The drawn cases: alive, varied, printed as scripts, small once shrunk."""

import dataclasses
import random
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, find, given, settings
from torch import nn
from torch.utils import _pytree as pytree

from cgmq_fx.errors import UsageError
from cgmq_fx.testing import OPT_IN, TRAITS, exported_programs, graph_modules, models
from cgmq_fx.testing.strategies import NOT_EXPORTED

GENERATE = settings(
    phases=[Phase.generate],
    derandomize=True,
    database=None,
    suppress_health_check=[],
    deadline=None,
)
USUAL = sorted(set(TRAITS) - OPT_IN)


def drawn(strategy, count):
    """Cases as a test sees them, without any health check suppressed."""
    cases = []

    @settings(GENERATE, max_examples=count)
    @given(strategy)
    def collect(case):
        cases.append(case)

    collect()
    return cases


def leaves(value):
    if dataclasses.is_dataclass(value):
        value = list(vars(value).values())
    return pytree.tree_leaves(value)


def run(module, case):
    torch.manual_seed(5)
    return leaves(module(*case.inputs(), **case.kwargs()))


def shrunk(strategy, predicate):
    return find(
        strategy,
        predicate,
        settings=settings(max_examples=2000, database=None, deadline=None),
        random=random.Random(0),
    )


def layers(case):
    """Lines that make layers, and lines that compute."""
    body = case.source.partition("super().__init__()")[2].partition("def make_model")[0]
    made, _, forward = body.partition("def forward")
    return [sum(bool(line.strip()) for line in part.splitlines()) for part in (made, forward)]


@pytest.fixture(scope="module")
def many():
    return drawn(graph_modules(), 400)


def faults_of(case):
    """What is wrong with a case: it must compute, differentiate, and be the same again."""
    model = case.model()
    outputs = run(model, case)
    if not all(output.isfinite().all() for output in outputs):
        return "not finite"
    if not all(output.std() > 1e-4 for output in outputs):
        return "constant"
    sum(output.square().sum() for output in outputs).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not gradients or not all(gradient.isfinite().all() for gradient in gradients):
        return "no finite gradients"
    if not any(gradient.abs().max() > 1e-6 for gradient in gradients):
        return "gradients vanish"
    return None


def test_every_case_computes_and_learns(many):
    assert [case for case in many if faults_of(case)] == []


def test_every_case_traces_to_the_same_numbers(many):
    for case in many:
        eager, traced = run(case.model(), case), run(case.graph_module(), case)
        assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True)), case


def test_cases_run_in_eval_mode_and_with_another_batch(many):
    for case in many[:100]:
        eager = case.model().eval()
        one = pytree.tree_map_only(torch.Tensor, lambda x: x[:1], (case.inputs(), case.kwargs()))
        assert all(output.isfinite().all() for output in leaves(eager(*one[0], **one[1])))


def test_every_trait_occurs(many):
    """What is drawn depends on constants in whatever code is loaded, so that a few may be rare."""
    longer = drawn(graph_modules(max_layers=12), 400)
    found = Counter(trait for case in [*many, *longer] for trait in case.traits)
    assert sorted(found) == USUAL
    # Hypothesis tries some choices again; that is a few of them.
    assert len({case.source for case in many}) > 0.75 * len(many)


def test_hardly_anything_is_filtered():
    """Hypothesis counts a draw that was given up as an example of its own."""
    tried = []

    @settings(GENERATE, max_examples=200)
    @given(graph_modules().map(lambda case: tried.append(case) or case))
    def collect(case):
        pass

    collect()
    assert len(tried) >= 200 * 0.98


def test_models_and_inputs_are_fresh_alike_and_leave_the_random_state(many):
    state = torch.get_rng_state()
    for case in many[:40]:
        first, second = case.model(), case.model()
        assert first is not second
        assert first.training
        state_pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) and a is not b for a, b in state_pairs)
        assert all(torch.equal(a, b) for a, b in zip(case.inputs(), case.inputs(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_parameter_or_statistic_keeps_its_default(many):
    for case in many[:100]:
        for name, tensor in case.model().state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            assert not torch.equal(tensor, torch.ones_like(tensor)), name
            assert not torch.equal(tensor, torch.zeros_like(tensor)), name


@pytest.mark.parametrize("trait", sorted(TRAITS))
def test_a_required_trait_is_there(trait):
    for case in drawn(models(require={trait}, max_layers=3), 12):
        assert trait in case.traits
        assert faults_of(case) is None, case


@pytest.mark.parametrize("trait", USUAL)
def test_an_excluded_trait_is_not_there(trait):
    for case in drawn(models(exclude={trait}, max_layers=4), 12):
        assert trait not in case.traits


# What the source of a case shows where it has a trait, and nowhere else.
SIGNS = {
    "attention": ("Attention", "attention(", "transpose(-2, -1)", "Transformer"),
    "batch_norm": ("BatchNorm",),
    "bilinear": ("nn.Bilinear",),
    "chunk": ("chunk", "split("),
    "conv": ("nn.Conv1d", "nn.Conv2d", "nn.Conv3d"),
    "dataclass_output": ("@dataclass",),
    "dropout": ("nn.Dropout",),
    "einsum": ("einsum",),
    "embedding": ("nn.Embedding",),
    "functional_dropout": ("F.dropout",),
    "keyword_input": ("make_kwargs",),
    "linear": ("nn.Linear",),
    "namedtuple_output": ("NamedTuple",),
    "output_padding": ("output_padding",),
    "padding_mode": ("padding_mode",),
    "tied": (".weight = self",),
    "transposed": ("nn.ConvTranspose",),
    "weight_norm": ("weight_norm",),
}


@pytest.mark.parametrize("trait", SIGNS)
def test_traits_tell_the_truth(many, trait):
    for case in many:
        assert (trait in case.traits) == any(sign in case.source for sign in SIGNS[trait]), case


def test_only_the_traits_allowed_occur():
    allowed = {"conv", "2d", "batch_norm", "residual", "grouped"}
    cases = drawn(models(traits=allowed), 60)
    assert frozenset().union(*(case.traits for case in cases)) == allowed


def test_max_layers_bounds_the_blocks():
    assert max(layers(case)[0] for case in drawn(models(max_layers=1), 40)) <= 9
    assert all(sum(layers(case)) <= 4 for case in drawn(models(max_layers=0, exclude={
        "two_inputs", "keyword_input", "default_input", "integer_input",
        *(name for name in TRAITS if name.endswith("_output")),
    }), 20))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"traits": ["residuals"]}, r"unknown traits 'residuals' \(did you mean 'residual'\?\)"),
        ({"exclude": ["conv4"]}, "unknown traits 'conv4'"),
        ({"require": ["tied"], "exclude": ["tied"]}, r"\['tied'\] are required, but not"),
        ({"max_layers": -1}, "max_layers is -1"),
        ({"traits": ["tied"]}, "nothing to begin"),
        ({"traits": ["tied", "2d", "conv"], "require": ["2d"], "exclude": ["conv"]}, "to begin"),
    ],
)
def test_restrictions_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        drawn(models(**options), 1)


def test_traits_that_cannot_meet_are_refused():
    with pytest.raises(UsageError, match="no model can have the required traits"):
        drawn(models(require={"depthwise", "attention"}, exclude={"reshape"}), 1)


def calls_a_module_twice(case):
    calls = Counter(n.target for n in case.graph_module().graph.nodes if n.op == "call_module")
    return max(calls.values(), default=0) > 1


def has_unusual_dropout(case):
    return any(isinstance(m, nn.Dropout) and m.p not in (0.0, 0.5) for m in case.model().modules())


SMALLEST = {
    "depthwise": (lambda case: "depthwise" in case.traits, (1, 3)),
    "dropout": (has_unusual_dropout, (2, 4)),
    "twice": (calls_a_module_twice, (1, 4)),
    "tied": (lambda case: "tied" in case.traits, (3, 4)),
    "two outputs": (lambda case: len(run(case.model(), case)) > 1, (3, 5)),
}


@pytest.mark.parametrize("name", SMALLEST)
def test_a_case_shrinks_to_a_small_one(name):
    predicate, (made, lines) = SMALLEST[name]
    case = shrunk(graph_modules(), predicate)
    found = layers(case)
    assert found[0] <= made, case
    assert found[1] <= lines, case
    assert "manual_seed(0)" in case.source


# Without .pth files, by which an editable cgmq_fx comes in.
ALONE = (
    f"import sys; sys.path.append({str(Path(torch.__file__).parents[1])!r})"
    + """
import runpy, sys, torch
assert not any(name.startswith("cgmq") for name in sys.modules)
torch.set_num_threads(1)
script = runpy.run_path(sys.argv[1], run_name="__main__")
torch.manual_seed(5)
kwargs = script["make_kwargs"]() if "make_kwargs" in script else {}
result = script["make_model"]()(*script["make_inputs"](), **kwargs)
torch.save(result if isinstance(result, torch.Tensor) else None, sys.argv[2])
"""
)


@pytest.mark.parametrize("require", [{"depthwise", "keyword_input"}, {"attention", "tied"}])
def test_the_printed_source_runs_by_itself(tmp_path, require):
    exclude = {name for name in TRAITS if name.endswith("_output")}
    [case] = drawn(models(require=require, exclude=exclude), 1)
    file = case.write(tmp_path / "case.py")
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ALONE, file, tmp_path / "out.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "def forward" in result.stdout
    torch.manual_seed(5)
    own = case.model()(*case.inputs(), **case.kwargs())
    assert torch.equal(torch.load(tmp_path / "out.pt"), own)


def test_a_failing_test_prints_the_script(tmp_path):
    test = tmp_path / "failing.py"
    test.write_text(
        "from hypothesis import given, settings\n"
        "from cgmq_fx.testing import graph_modules\n\n"
        "@settings(database=None, deadline=None)\n"
        "@given(graph_modules(require={'tied'}, max_layers=1))\n"
        "def test(case):\n"
        "    assert len(case.model().state_dict()) == 0\n\n"
        "test()\n"
    )
    command = [sys.executable, test]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    said = result.stdout + result.stderr
    lines = [line.removeprefix("| ").removeprefix("  | ") for line in said.splitlines()]
    start = next(i for i, line in enumerate(lines) if line == "import torch")
    end = next(i for i, line in enumerate(lines) if "symbolic_trace(model)" in line)
    script = tmp_path / "script.py"
    script.write_text("\n".join(lines[start : end + 1]))
    again = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "def forward" in again.stdout


def test_a_traceback_shows_the_lines_of_the_source(many):
    case = next(case for case in many if "conv" in case.traits)
    try:
        case.model()(torch.zeros(1))
    except Exception:
        said = traceback.format_exc()
    assert any(
        line.strip() in said for line in case.source.splitlines() if line.startswith("        x")
    )


@settings(max_examples=15, deadline=None)
@given(exported_programs(max_layers=3))
def test_exported_programs_take_any_batch(case):
    assert not case.traits & NOT_EXPORTED
    module = case.exported().module()
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda x: torch.cat((x, x)), (case.inputs(), case.kwargs())
    )
    outputs = leaves(module(*args, **kwargs))
    assert all(output.isfinite().all() for output in outputs)
    torch.manual_seed(5)
    exported = leaves(case.exported(dynamic_batch=False).module()(*case.inputs(), **case.kwargs()))
    if not any(
        "dropout" in line.lower() or "attention" in line for line in case.source.splitlines()
    ):
        for mine, theirs in zip(run(case.model(), case), exported, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_missing_hypothesis_is_named_with_the_extra():
    code = "import sys; sys.modules['hypothesis'] = None; import cgmq_fx; import cgmq_fx.testing"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "pip install 'cgmq-fx[testing]'" in result.stderr.splitlines()[-1]
    assert "import cgmq_fx.testing" not in result.stderr.splitlines()[-1]
