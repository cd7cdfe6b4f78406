"""What `skip` and `overrides` of `prepare` select, and what they refuse."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cgmq_fx
from cgmq_fx.errors import BudgetError, CgmqError, CostTableError, UsageError
from cgmq_fx.lower import lower
from cgmq_fx.overrides import Override
from cgmq_fx.prepare import prepare
from graph_zoo import Calls, TiedLanguageModel
from source_tree import ROOT

X = torch.randn(2, 4)


class Head(nn.Module):
    """A composite layer: two products."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 3), Head()

    def forward(self, x):
        return self.head(torch.relu(self.stem(x)))


SITES = ("stem_weight", "x", "head_hidden_weight", "relu", "head_out_weight", "relu_1")
HEAD = {"head_hidden_weight", "relu", "head_out_weight", "relu_1"}


def prepared(model=None, budget="100%", inputs=X, **options):
    return prepare(Net() if model is None else model, budget, example_inputs=inputs, **options)


def skipped_sites(**options):
    return set(SITES) - set(prepared(**options).quantizers)


SELECTORS = {
    "an operation": ("head.out", {"head_out_weight", "relu_1"}),
    "all below a layer": ("head", HEAD),
    "a glob": ("head.h*", {"head_hidden_weight", "relu"}),
    "a quantizer": ("relu_1", {"relu_1"}),
    "a weight": ("head.out.weight", {"head_out_weight"}),
    "a glob of weights": ("head.*.weight", {"head_hidden_weight", "head_out_weight"}),
    "a type of layer": (nn.Linear, set(SITES)),
    "a type of composite layer": (Head, HEAD),
    "a predicate": (lambda o: o.role == "weight" and o.shape[0] == 2, {"head_out_weight"}),
    "the role of an input": (lambda o: o.role == "input", {"x"}),
    "several": (["stem", "relu_1"], {"stem_weight", "x", "relu_1"}),
    "what is float anyway": (["relu", "head.out"], {"relu", "head_out_weight", "relu_1"}),
    "none": ((), set()),
}


@pytest.mark.parametrize(("skip", "sites"), SELECTORS.values(), ids=SELECTORS)
def test_what_a_selector_skips(skip, sites):
    assert skipped_sites(skip=skip) == sites


def test_without_shapes_the_same_is_skipped():
    for skip, sites in SELECTORS.values():
        if skip is not SELECTORS["a predicate"][0]:
            assert set(SITES) - set(prepare(Net(), "100%", skip=skip).quantizers) == sites


def test_what_a_predicate_sees():
    seen = []
    prepared(skip=lambda operand: bool(seen.append(operand)) or operand.op == "linear")
    described = {(o.operation, o.role): o for o in seen}
    weight, data = described["head.out", "weight"], described["head.out", "activation"]
    assert (weight.tensor, weight.site) == ("head.out.weight", "head_out_weight")
    assert weight.shape == (2, 3)
    assert (data.tensor, data.site, data.shape) == ("relu_1", "relu_1", (1, 3))
    assert weight.module_type is nn.Linear
    assert weight.module_path == "head.out"
    assert weight.target == "torch._C._nn.linear"
    assert described["stem", "input"].site == "x"


def test_a_skipped_operation_is_float_and_says_why():
    accounting = prepared(skip="head.out").plan.accounting
    entry = next(item for item in accounting.ledger if item.name == "head.out")
    assert entry.status == "float"
    assert entry.reason == "skipped by skip='head.out'; priced at 32 bits"
    row = accounting.resources["bops"].costs(accounting.index(accounting.lowest_bits()))
    place = [bound.operation.name for bound in accounting.operations].index("head.out")
    assert row[place] == 6 * 32 * 32


def test_an_operation_that_reads_one_float_operand_says_which():
    entries = prepared(skip="head.out.weight").plan.accounting.ledger
    reason = next(item.reason for item in entries if item.name == "head.out")
    assert (
        reason == "skipped by skip='head.out.weight'; of its operands weight alone, priced at "
        "32 bits"
    )


def test_a_tensor_is_quantized_for_those_who_do_not_skip_it():
    layers = {"left": nn.Linear(4, 4), "right": nn.Linear(4, 4)}
    model = Calls(lambda m, x: m.left(F.relu(x)) + m.right(F.relu(x)), **layers)
    module = prepared(
        Calls(lambda m, x: (lambda y: m.left(y) + m.right(y))(F.relu(x)), **layers), skip="right"
    )
    calls = {node.target: node for node in module.graph.nodes if node.op == "call_module"}
    (reader,) = calls["quantizers.relu"].users
    assert reader.args[1] is calls["quantizers.left_weight"]
    assert "right_weight" not in module.quantizers
    assert len(prepared(model).quantizers) == 4


def test_attention_is_one_operation():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    wrapped = Calls(lambda m, x: m.attention(x, x, x, need_weights=False)[0], attention=model)
    x = torch.randn(2, 3, 8)
    sites = list(prepared(wrapped, inputs=x).quantizers)
    within = next(site for site in sites if site.endswith("_weights"))
    names = {entry.name for entry in prepared(wrapped, inputs=x).plan.accounting.ledger}
    assert {"attention:2.qk", "attention:2.pv"} <= names
    skipped = prepared(wrapped, inputs=x, skip="attention:2.pv", learn_input_bits=True)
    assert within not in skipped.quantizers
    reasons = {entry.name: entry.reason for entry in skipped.plan.accounting.ledger}
    for part in ("qk", "pv"):
        assert reasons[f"attention:2.{part}"].startswith("skipped by skip='attention:2.pv'")
    assert skipped(x).equal(wrapped(x))
    alone = prepared(wrapped, inputs=x, skip=within)
    assert set(sites) - set(alone.quantizers) == {within}
    fixed = prepared(wrapped, inputs=x, overrides={within: {"bit_width": 4}})
    assert fixed.bit_widths[within] == 4


def test_shared_layers_and_weights_answer_to_all_their_names():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert not {"0_weight_"} & set(prepared(model, skip="2").quantizers)
    assert "0_weight_" not in prepared(model, skip="2.weight").quantizers
    assert "0_weight_" in prepared(model, skip="1").quantizers


TOKENS = torch.randint(11, (2, 5))
MEMORY = {"bops": "100%", "weight_memory": "100%"}


def test_a_tied_weight_is_skipped_everywhere_or_nowhere():
    model = TiedLanguageModel()
    with pytest.raises(UsageError) as caught:
        prepared(model, MEMORY, TOKENS, skip="out")
    text = str(caught.value)
    assert "weight 'embed.weight' is skipped in 'out' by skip='out'" in text
    assert "quantized in 'embed'" in text
    assert "skip='embed.weight'" in text
    for skip in ("embed.weight", "out.weight", ["embed", "out"]):
        module = prepared(model, MEMORY, TOKENS, skip=skip)
        assert "embed_weight" not in module.quantizers
    # Where nobody prices the look-up, it stays float with the one operation that is skipped.
    assert "embed_weight" not in prepared(model, inputs=TOKENS, skip="out").quantizers
    with pytest.raises(UsageError, match="skipped in 'embed' by skip='embed'"):
        prepared(model, inputs=TOKENS, skip="embed")


def test_a_layer_that_runs_twice_is_skipped_twice_or_not_at_all():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    with pytest.raises(UsageError, match=r"'0\.weight' is skipped in '0:2' by skip='0:2'"):
        prepared(model, skip="0:2")


# -- overrides -----------------------------------------------------------------------------------


def spec(site, **options):
    return prepared(**options).quantizers[site].spec


def test_a_fixed_bit_width():
    module = prepared(overrides={"head.out": Override(bit_width=4)})
    assert [module.bit_widths[site] for site in ("head_out_weight", "relu_1")] == [4, 4]
    assert module.bit_widths["stem_weight"] == 32
    sites = {site.name: site for site in module.plan.accounting.sites}
    assert sites["head_out_weight"].allowed == (4,)
    assert not sites["head_out_weight"].learned
    alone = prepared(overrides={"head.out": {"bit_width": 4, "role": "weight"}})
    assert [alone.bit_widths[site] for site in ("head_out_weight", "relu_1")] == [4, 32]


def test_allowed_widths_are_exactly_those():
    module = prepared(overrides={"head.*": {"widths": [8, 4, 8]}})
    allowed = {site.name: site.allowed for site in module.plan.accounting.sites}
    assert allowed["head_out_weight"] == allowed["relu"] == (4, 8)
    assert allowed["stem_weight"] == (2, 4, 8, 16, 32)
    assert module.bit_widths["relu"] == 8


def test_an_input_may_have_other_bits_than_the_table_says():
    assert spec("x").widths == (8, 32)
    assert spec("x", overrides={"x": {"bit_width": 4}}).widths == (4, 32)
    learned = spec("x", overrides={"x": {"widths": (2, 8)}})
    assert (learned.widths, learned.learned) == ((2, 8), True)
    assert spec("x", overrides={"stem": {"bit_width": 4, "role": "input"}}).widths == (4, 32)
    assert spec("x", overrides={"x": {"affine": False}}).widths == (8, 32)


SCHEMES = [
    ("stem_weight", None, "symmetric"),
    ("stem_weight", False, "symmetric"),
    ("stem_weight", True, "affine"),
    ("relu", None, "unsigned"),
    ("relu", False, "unsigned"),
    ("relu", True, "affine"),
    ("x", None, "affine"),
    ("x", False, "symmetric"),
    ("x", True, "affine"),
]


@pytest.mark.parametrize(("site", "affine", "scheme"), SCHEMES)
def test_the_scheme_follows_affine_and_the_sign(site, affine, scheme):
    overrides = None if affine is None else {site: {"affine": affine}}
    assert spec(site, overrides=overrides).scheme == scheme


def test_ranges_per_channel_or_per_tensor():
    assert spec("stem_weight").num_channels == 3
    assert spec("stem_weight", overrides={"stem": {"per_channel": False}}).channel_axis is None
    one = {"per_channel": False, "overrides": {"stem": {"per_channel": True}}}
    assert spec("stem_weight", **one).num_channels == 3
    assert spec("head_out_weight", **one).num_channels == 1


def test_an_exact_name_wins_and_sayings_add_up():
    overrides = {
        "head.*": {"bit_width": 8, "affine": True},
        nn.Linear: {"per_channel": False},
        "head.out.weight": {"bit_width": 4},
        "head.hidden": {"widths": (2, 4), "role": "weight"},
    }
    module = prepared(overrides=overrides)
    specs = {name: quantizer.spec for name, quantizer in module.quantizers.items()}
    assert specs["head_out_weight"].widths == (4, 32)
    assert specs["head_hidden_weight"].widths == (2, 4)
    assert specs["relu_1"].widths == specs["relu"].widths == (8, 32)
    assert {specs[name].scheme for name in HEAD} == {"affine"}
    assert all(item.channel_axis is None for item in specs.values())


def test_an_exact_skip_wins_over_a_wide_override():
    module = prepared(skip="head.out", overrides={nn.Linear: {"bit_width": 4}})
    assert set(module.bit_widths.items()) == {
        (site, 4) for site in SITES if site not in ("head_out_weight", "relu_1")
    }


# -- refusals ------------------------------------------------------------------------------------


def failing(operand):
    return 1 / 0


REFUSED = {
    "unknown names, all at once": (
        {"skip": ["head.uot", "stam"]},
        ("'head.uot' selects nothing", "did you mean 'head.out'", "'stam'", "'stem'"),
    ),
    "a glob of nothing": ({"skip": "tail.*"}, ("'tail.*' selects nothing", "names are head,")),
    "a type that is not there": ({"skip": nn.LSTM}, ("rnn.LSTM selects nothing",)),
    "a predicate that is never true": (
        {"skip": lambda operand: False},
        ("<lambda> selects nothing",),
    ),
    "a predicate that raises": (
        {"skip": failing},
        ("failing raised ZeroDivisionError", "'stem.weight' of operation 'stem'"),
    ),
    "a predicate that returns no bool": (
        {"overrides": {lambda o: "yes": {"bit_width": 4}}},
        ("<lambda> returned 'yes' of type str", "return True or False"),
    ),
    "no selector": ({"skip": [3, int]}, ("skip: 3 selects", "skip: <class 'int'> selects")),
    "an empty text": ({"skip": ""}, ("skip: '' selects nothing",)),
    "a layer itself": ({"skip": nn.ReLU()}, ("skip: ReLU() selects nothing",)),
    "skipped and overridden": (
        {"skip": "head", "overrides": {"head.out": {"bit_width": 4}}},
        ("overrides['head.out'] (bit_width=4)", "'head_out_weight'", "skip='head'"),
    ),
    "overridden by name, skipped by type": (
        {"skip": Head, "overrides": {"head.out": {"bit_width": 4}}},
        ("'head_out_weight'", "Head leaves out"),
    ),
    "two overrides that disagree": (
        {"overrides": {"head.*": {"bit_width": 4}, nn.Linear: {"bit_width": 8}}},
        ("'relu_1'", "overrides['head.*'] says bit_width=4", "Linear] says bit_width=8"),
    ),
    "a layer and its neighbour": (
        {"overrides": {"head": {"bit_width": 4}, "head.out": {"widths": (4, 8)}}},
        ("'head_out_weight'", "says widths=(4, 8)", "role='weight'"),
    ),
    "an override of nothing": (
        {"overrides": {"head": {"bit_width": 4}, "no": {"bit_width": 4}}},
        ("overrides: 'no' selects nothing",),
    ),
    "a role that is not there": (
        {"overrides": {"head.out": {"bit_width": 4, "role": "input"}}},
        ("'head.out' selects activation and weight operands, none of the role 'input'",),
    ),
    "unknown keys": ({"overrides": {"head": {"bits": 4}}}, ("overrides['head']", "['bits']")),
    "bad widths": (
        {"overrides": {"head": {"bit_width": 17, "widths": (4, True, 99)}}},
        ("bit_width=17 must", "has [True, 99]", "give one of them"),
    ),
    "a role without its key": (
        {"overrides": {"head": {"role": "input", "per_channel": True}}},
        ("per_channel=True concerns weights",),
    ),
    "nothing said": ({"overrides": {"head": {"role": "weight"}}}, ("it says nothing",)),
    "unknown role": ({"overrides": {"head": {"role": "bias"}}}, ("role='bias' is unknown",)),
    "flags": ({"overrides": {"head": {"affine": 1}}}, ("affine=1 must be True or False",)),
    "no mapping": ({"overrides": ["head"]}, ("overrides is of type list",)),
    "no override": ({"overrides": {"head": 4}}, ("overrides['head']: 4 is of type int",)),
    "share of what cannot": ({"share": ("conv2d",)}, ("has ['conv2d']", "add, sub, cat")),
    "share as a text": ({"share": "mul"}, ("share='mul' has ['mul']",)),
}


@pytest.mark.parametrize(("options", "parts"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_says_what_and_where(options, parts):
    with pytest.raises(UsageError) as caught:
        prepared(**options)
    for part in parts:
        assert part in str(caught.value)


def test_an_override_of_what_is_never_quantized():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(UsageError, match="'1' selects operations of which nothing is quantized"):
        prepared(model, overrides={"1": {"bit_width": 4}})
    assert len(prepared(model, skip="1").quantizers) == 2


TABLE = {
    "name": "npu",
    "unit": "cycle",
    "row": [
        {
            "op": "linear",
            "per": "mac",
            "grid": [
                {"weight": w, "activation": a, "cost": w * a} for w in (4, 8) for a in (8, 16)
            ],
        }
    ],
}


def test_a_width_that_the_hardware_lacks():
    with pytest.raises(CostTableError) as caught:
        prepared(cost_table=TABLE, overrides={"head.out": {"bit_width": 5, "role": "weight"}})
    text = str(caught.value)
    assert "'head_out_weight' may have [5] by overrides['head.out']" in text
    assert "table 'npu' has [4, 8]" in text


# -- budgets -------------------------------------------------------------------------------------


def refused(budget, **options):
    with pytest.raises(BudgetError) as caught:
        prepared(budget=budget, **options)
    for change in caught.value.unlocks:
        prepared(budget=budget, **{**options, **change})
    return caught.value


def test_a_refusal_offers_not_to_skip():
    error = refused("5%", skip=["head.hidden", "stem"])
    assert "do not skip 'stem'" in str(error)
    assert {"skip": ("head.hidden",)} not in error.unlocks
    assert {"skip": ()} in error.unlocks
    error = refused("40%", skip=["head.hidden", "stem"])
    assert {"skip": ("head.hidden",)} in error.unlocks


def test_a_refusal_offers_to_drop_an_override():
    error = refused("3%", overrides={nn.Linear: {"bit_width": 8}})
    assert {"overrides": {}} in error.unlocks
    assert "drop overrides[torch.nn.modules.linear.Linear] (bit_width=8)" in str(error)
    # Other bit-widths for all would not change those that an override fixes.
    assert not any("widths" in change for change in error.unlocks)


def test_a_first_batch_refuses_with_the_same_changes():
    module = prepare(Net(), "40%", skip=["head.hidden", "stem"])
    graph, modules = str(module.graph), dict(module.named_modules())
    with pytest.raises(BudgetError) as caught:
        module(X)
    assert {"skip": ("head.hidden",)} in caught.value.unlocks
    # Trying the changes left the graph and its modules as they were.
    assert str(module.graph) == graph
    assert dict(module.named_modules()) == modules
    assert not module.plan.is_priced


# -- what lasts ----------------------------------------------------------------------------------


def test_settings_copy_and_pickle():
    options = {"skip": ["stem.weight"], "overrides": {Head: Override(bit_width=4)}}
    module = prepared(**options)
    settings = module.plan.settings
    assert pickle.loads(pickle.dumps(settings.choices)) == settings.choices
    assert copy.deepcopy(module).plan.settings.choices == settings.choices
    assert copy.deepcopy(module).bit_widths == module.bit_widths
    lone = prepared(skip=lambda operand: operand.op == "linear").plan.settings.choices
    again = pickle.loads(pickle.dumps(lone))
    assert again.skip[0].text == lone.skip[0].text


def test_a_checkpoint_loads_into_the_same_choices():
    options = {"skip": "stem", "overrides": {"head": {"bit_width": 4, "affine": True}}}
    first, second = prepared(**options), prepared(**options)
    first(X)
    second.load_state_dict(first.state_dict())
    assert second.eval()(X).equal(first.eval()(X))


@pytest.mark.parametrize("bit_width", [2, 8, 16])
def test_affine_weights_are_lowered_to_codes(bit_width):
    override = Override(bit_width=bit_width, affine=True, role="weight")
    model = Net()
    with torch.no_grad():
        model.stem.weight.abs_().add_(0.5)  # all on one side of 0
    module = prepared(model, overrides={nn.Linear: override})
    module(X)
    fixed = lower(module, allow_untrained=True)
    assert fixed(X).equal(module.eval()(X))
    frozen = fixed.get_submodule("frozen.head_out_weight")
    assert frozen.zero_point.shape == (2, 1)
    assert 0 <= int(frozen.codes.min()) < int(frozen.codes.max()) < 2**bit_width
    assert "head.out.weight" not in fixed.state_dict()
    assert fixed.get_submodule("frozen.stem_weight").zero_point is None


def test_the_public_name():
    assert cgmq_fx.Override(bit_width=4) == Override(bit_width=4)
    assert issubclass(UsageError, CgmqError)


class Documented(nn.Module):
    """The model that the README's section on choices speaks of."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv1 = nn.Embedding(5, 4), nn.Conv1d(4, 4, 1)
        self.blocks = nn.Sequential(nn.Conv1d(4, 32, 1), nn.ReLU(), nn.Conv1d(32, 4, 1))
        self.head = nn.Linear(4, 2)

    def forward(self, tokens):
        x = self.conv1(self.embed(tokens).mT)
        return self.head((x + self.blocks(x)).mean(-1))


def test_the_readme_section_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Choosing what is quantized")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    x = torch.randint(5, (2, 3))
    names = {"cgmq_fx": cgmq_fx, "torch": torch, "model": Documented(), "x": x}
    exec(code, names)
    module = names["prepared"]
    assert "head_weight" not in module.quantizers
    assert module.bit_widths["conv1_weight"] == 8
    assert module.quantizers["conv1_weight"].spec.channel_axis is None
    assert module.quantizers["blocks_0_weight"].spec.scheme == "affine"
