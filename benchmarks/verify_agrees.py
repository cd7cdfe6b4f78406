"""Does the file alone say what the report says? On generated models, at random bit-widths.

Each example draws a model, budgets, cost tables and a bit-width for every quantizer, lowers and
exports it, and compares: the text and the JSON of `verify` with those of `report`, to the last
digit, and every tensor of the file with that of the module, bit for bit, or what a runtime makes of
the file with what the module computes. Run it with

    python benchmarks/verify_agrees.py --examples 200 --output benchmarks/results/verify_agrees.md

A format ends at its first difference, and the script with 1; `--suffix` names some formats, and
`--shrink` looks for the smallest model that has the difference.
"""

import argparse
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, reject, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cgmq_fx.errors import UnsupportedModelError
from cgmq_fx.export import export
from cgmq_fx.frozen import FrozenQuantizer
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
import pages  # noqa: E402

# Copies of codes beside a float tensor may take more than the float network: no share bounds them.
_ALL = {"bops": "100%", "weight_memory": "100%", "peak_activation_memory": "1 GiB"}
BUDGETS: tuple[Any, ...] = ("100%", {"weight_memory": "100%"}, _ALL)
WIDTHS = ((8, 32), (2, 4, 8, 16, 32), (3, 5, 7, 32), tuple(range(17)), (0, 1, 8))
#: How far sums in another order are apart, as a share of a number and of a tenth of the largest,
#: and those whose bias is rounded to a step of the accumulator, as ONNX Runtime's integer kernels
#: have it: little at 8 bits, much at fewer, which are held to ONNX Runtime's unoptimized graph.
_ROUNDED_SUMS, _ROUNDED_BIASES, _NARROW_BIASES = 1e-5, 3e-4, 1e-2
_DISTURBED_RUNS = 8
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
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        _compare(load_exported(path)(*inputs), fixed, inputs)


def check_onnx(path: Path, fixed: LoweredModule, inputs: Sequence[Any]) -> None:
    """Compare what ONNX Runtime, or qonnx's executor, returns with what the module does."""
    # a Python number is a constant of the file
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if path.name.endswith(".qonnx.onnx"):
            found = onnx_runs.run_qonnx(path, tensors)
            if found is not None:
                _compare(found, fixed, inputs)
            return
        _compare(onnx_runs.run(path, tensors, onnx_runs.UNOPTIMIZED), fixed, inputs)
        if not _has_narrow(fixed):
            _compare(onnx_runs.run(path, tensors), fixed, inputs, _ROUNDED_BIASES)


def check_pte(path: Path, fixed: LoweredModule, inputs: Sequence[Any]) -> None:
    """Compare what ExecuTorch's runtime returns with what the module does.

    XNNPACK rounds biases and the sums of its int8 layers to integers: a value near the middle
    between two codes gets either.
    """
    disturbance = _NARROW_BIASES if _has_narrow(fixed) else _ROUNDED_BIASES
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        _compare(executorch_runs.run(path, tree_leaves(inputs)), fixed, inputs, disturbance)


def _has_narrow(fixed: LoweredModule) -> bool:
    return bool(set(fixed.bit_widths.values()) & set(range(1, 8)))


def _compare(
    found: Any, fixed: LoweredModule, inputs: Sequence[Any], disturbance: float = _ROUNDED_SUMS
) -> None:
    """Compare all numbers but those that the module itself changes with roundings of its sums."""
    wanted = tree_leaves(fixed(*inputs))
    disturbed = [_disturbed(fixed, inputs, disturbance, seed) for seed in range(_DISTURBED_RUNS)]
    for ours, theirs, *others in zip(tree_leaves(found), wanted, *disturbed, strict=True):
        if not isinstance(theirs, torch.Tensor) or not theirs.is_floating_point():
            continue
        assert ours.shape == theirs.shape
        agrees = _is_close(ours, theirs)
        for other in others:
            agrees |= ~_is_close(other, theirs)
        assert agrees.float().mean() >= 0.9 or theirs.numel() < 10, "more than roundings apart"


def _is_close(ours: Tensor, theirs: Tensor) -> Tensor:
    return torch.isclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)


def _disturbed(
    fixed: LoweredModule, inputs: Sequence[Any], disturbance: float, seed: int
) -> list[Any]:
    """Return the outputs where what quantizers read is off by as much."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = arguments
        noise = torch.randn(x.shape, generator=generator)
        return (x + disturbance * (x.abs() + 0.1 * x.abs().max()) * noise, *rest)

    quantizers = (module for module in fixed.modules() if isinstance(module, FrozenQuantizer))
    hooks = [module.register_forward_pre_hook(disturb) for module in quantizers]
    try:
        return tree_leaves(fixed(*inputs))
    finally:
        for hook in hooks:
            hook.remove()


CONTENT: Mapping[str, Callable[[Path, LoweredModule, Sequence[Any]], None]] = {
    ".safetensors": check_packed,
    ".pt2": check_program,
    ".pte": check_pte,
    ".onnx": check_onnx,
    ".qonnx.onnx": check_onnx,
}


#: What the content of a file is compared with.
COMPARED: Mapping[str, str] = {
    ".safetensors": "every tensor, bit for bit",
    ".pt2": "outputs in PyTorch",
    ".onnx": "outputs in ONNX Runtime",
    ".qonnx.onnx": "outputs in qonnx's executor",
    ".pte": "outputs in ExecuTorch",
}


def run(
    examples: int, suffix: str = ".safetensors", *, start: int = 0, shrink: bool = False
) -> Counter[str]:
    """Check as many models; raise at the first difference.

    Args:
        examples: how many are compared; models that an exporter refuses do not count.
        suffix: of the files.
        start: what the drawing starts from.
        shrink: look for the smallest model with the difference.

    Returns:
        How many models were ``compared`` and how many ``refused``.
    """
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:

        @seed(start)
        @settings(
            max_examples=examples, deadline=None, database=None, print_blob=True, phases=phases,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(models(), st.data())
        def every(drawn: Case, data: st.DataObject) -> None:
            counts["refused"] += 1
            check(drawn, data, Path(folder), suffix)
            counts.update(refused=-1, compared=1)

        every()
    return counts


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--suffix", nargs="+", choices=list(CONTENT), default=list(CONTENT))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shrink", action="store_true", help="shrink a failing model")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, failed = [], []
    for suffix in arguments.suffix:
        begin = time.process_time()
        try:
            counts = run(arguments.examples, suffix, start=arguments.seed, shrink=arguments.shrink)
            outcome = (counts["compared"], counts["refused"])
        except Exception:
            traceback.print_exc()
            failed.append(suffix)
            outcome = ("a difference", "")
        seconds = time.process_time() - begin
        rows.append((f"`{suffix}`", *outcome, COMPARED[suffix], f"{seconds:.0f} s"))
        print(*rows[-1], flush=True)
    if arguments.output:
        columns = (
            "file",
            "models compared",
            "refused by the exporter",
            "content",
            "processor time",
        )
        packages = ("torch", "onnxruntime", "qonnx", "executorch", "hypothesis")
        lines = [
            f"{pages.versions(*packages)}; seed {arguments.seed}. The text and the JSON of "
            "`verify` are those of `report`, to the last digit.",
            "",
            *pages.table(columns, rows),
        ]
        command = f"python benchmarks/verify_agrees.py --examples {arguments.examples}"
        pages.write(arguments.output, "What a file alone says, beside the report", command, lines)
    if failed:
        sys.exit(f"verify and report, or file and module, differ: {', '.join(failed)}")


if __name__ == "__main__":
    main()
