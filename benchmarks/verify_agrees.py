"""Does the file alone say what the report says? On generated models, at random bit-widths.

Each example draws a model, budgets, cost tables and a bit-width for every quantizer, lowers and
exports it, and compares: the text and the JSON of `verify` with those of `report`, to the last
digit, and every tensor of the file with that of the module, bit for bit. Run it with

    python benchmarks/verify_agrees.py --examples 200 --suffix .pt2

It ends with 1 at the first difference; `--shrink` looks for the smallest model that has it.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.export import export
from cgmq_fx.load_exported import load_exported
from cgmq_fx.load_packed import load_packed
from cgmq_fx.lower import lower
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.prepare import prepare
from cgmq_fx.report import report
from cgmq_fx.testing import Case, models
from cgmq_fx.testing.check_prepare import positional_inputs
from cgmq_fx.verify import verify

sys.path[:0] = [str(Path(__file__).parent)]  # the modules beside this script

import executorch_runs  # noqa: E402
import onnx_runs  # noqa: E402

# Copies of codes beside a float tensor may take more than the float network: no share bounds them.
_ALL = {"bops": "100%", "weight_memory": "100%", "peak_activation_memory": "1 GiB"}
BUDGETS: tuple[Any, ...] = ("100%", {"weight_memory": "100%"}, _ALL)
WIDTHS = ((2, 4, 8, 16, 32), (3, 5, 7, 32), tuple(range(17)), (0, 1, 8))
TABLES: tuple[Any, ...] = ("bops", ["bops", "macs"], ["macs", "energy_45nm", "bops"])


def check(drawn: Case, data: st.DataObject, folder: Path, suffix: str = ".safetensors") -> None:
    """Check one model."""
    fixed, inputs = lowered(drawn, data)
    try:
        path = export(fixed, folder / f"model{suffix}", example_inputs=inputs)
    except UnsupportedModelError:
        reject()  # torch.export cannot take it, or not with an open batch
    wanted, found = report(fixed), verify(path)
    assert str(found) == str(wanted)
    assert found.to_json() == wanted.to_json()
    CONTENT[suffix](path, fixed, inputs)


def lowered(drawn: Case, data: st.DataObject) -> tuple[LoweredModule, Sequence[Any]]:
    """Return a drawn model, lowered at drawn bit-widths, and its inputs."""
    model = drawn.model()
    inputs = positional_inputs(model, *drawn.inputs(), **drawn.kwargs())
    prepared = prepare(
        model,
        data.draw(st.sampled_from(BUDGETS), label="budget"),
        example_inputs=inputs,
        widths=data.draw(st.sampled_from(WIDTHS), label="widths"),
        cost_table=data.draw(st.sampled_from(TABLES), label="cost_table"),
        per_channel=data.draw(st.booleans(), label="per_channel"),
    )
    sites = prepared.plan.accounting.sites
    bits = [data.draw(st.sampled_from(site.allowed), label=site.name) for site in sites]
    prepared.eval()
    with torch.no_grad():
        prepared(*inputs)
        prepared.set_bit_widths(bits)
        prepared(*inputs)
    return lower(prepared, allow_untrained=True), inputs


def check_packed(path: Path, fixed: LoweredModule, inputs: Sequence[Any]) -> None:
    """Compare every tensor of a packed file with that of the module, bit for bit."""
    state = load_packed(path)
    assert dict(state.bit_widths) == fixed.bit_widths
    own = {**dict(fixed.named_parameters()), **dict(fixed.named_buffers())}
    own = {name: value for name, value in own.items() if not name.startswith("plan.")}
    assert set(own) == set(state.tensors)
    for name, value in own.items():
        there = state.tensors[name]
        assert (there.dtype, there.shape) == (value.dtype, value.shape), name
        equal = torch.equal(there, value) or torch.equal(there.isnan(), value.isnan())
        assert equal, f"{name} differs"
    state.load_into(fixed)


def check_program(path: Path, fixed: LoweredModule, inputs: Sequence[Any]) -> None:
    """Compare what a program returns with what the module does.

    The operators of the program multiply with 1 / scale where the module divides by scale: a value
    within rounding of the middle between two codes gets either, and what follows moves by a step.
    All but a few numbers are equal, so, up to the sums of float kernels.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        _compare(load_exported(path)(*inputs), fixed(*inputs))


def check_onnx(path: Path, fixed: LoweredModule, inputs: Sequence[Any]) -> None:
    """Compare what ONNX Runtime, or qonnx's executor, returns with what the module does."""
    run = onnx_runs.run_qonnx if path.name.endswith(".qonnx.onnx") else onnx_runs.run
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
        found = run(path, tensors)  # a Python number is a constant of the file
        if found is not None:
            _compare(found, fixed(*inputs))


def check_pte(path: Path, fixed: LoweredModule, inputs: Sequence[Any]) -> None:
    """Compare what ExecuTorch's runtime returns with what the module does.

    XNNPACK rounds biases and the sums of its int8 layers to integers: a value near the middle
    between two codes gets either.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        _compare(executorch_runs.run(path, tree_leaves(inputs)), fixed(*inputs))


def _compare(found: Any, wanted: Any) -> None:
    pairs = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
    for ours, theirs in pairs:
        if not isinstance(theirs, torch.Tensor) or not theirs.is_floating_point():
            continue
        assert ours.shape == theirs.shape
        close = torch.isclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)
        assert close.float().mean() >= 0.8 or theirs.numel() < 5, "more than roundings apart"


CONTENT: Mapping[str, Callable[[Path, LoweredModule, Sequence[Any]], None]] = {
    ".safetensors": check_packed,
    ".pt2": check_program,
    ".pte": check_pte,
    ".onnx": check_onnx,
    ".qonnx.onnx": check_onnx,
}


def run(examples: int, suffix: str = ".safetensors", *, shrink: bool = False) -> None:
    """Check as many models; raise at the first difference."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    with tempfile.TemporaryDirectory() as folder:

        @settings(
            max_examples=examples, deadline=None, database=None, print_blob=True, phases=phases,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(models(), st.data())
        def every(drawn: Case, data: st.DataObject) -> None:
            check(drawn, data, Path(folder), suffix)

        every()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--suffix", choices=list(CONTENT), default=".safetensors")
    parser.add_argument("--shrink", action="store_true", help="shrink a failing model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run(arguments.examples, arguments.suffix, shrink=arguments.shrink)
    print(f"{arguments.examples} models: verify and report agree to the last digit")


if __name__ == "__main__":
    main()
