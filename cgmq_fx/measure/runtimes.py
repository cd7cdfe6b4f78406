"""The runtimes whose latency can be measured: a lowered model in, callables out."""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from cgmq_fx.errors import UsageError
from cgmq_fx.executorch_program import executorch_program
from cgmq_fx.export import export
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.measure.rows import Pair


class Exported(Protocol):
    """A model in the form that its runtime takes."""

    def whole(self) -> Callable[[], object]:
        """Return what runs the model once, in one thread."""

    def part(self, outputs: Sequence[int]) -> Callable[[], object]:
        """Return what computes only the outputs at these positions."""


class Runtime(Protocol):
    """What runs a lowered model."""

    @property
    def name(self) -> str:
        """What the command line calls it."""

    @property
    def version(self) -> str:
        """Name and version, for the table's source."""

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Bit-widths of weights and activations for which it has kernels of their own, rising."""

    def export(self, fixed: LoweredModule, inputs: Sequence[torch.Tensor]) -> Exported:
        """Return `fixed` in the form that the runtime takes, to be run on `inputs`.

        Raises:
            CgmqError: the model cannot be exported for this runtime.
        """


class OnnxRuntime:
    """ONNX Runtime on the CPU, from an exported ``.onnx`` file."""

    name = "onnxruntime"
    pairs: tuple[Pair, ...] = ((8, 8), (32, 32))

    @property
    def version(self) -> str:
        """Name and version."""
        return f"ONNX Runtime {_installed('onnxruntime', 'onnx')}, CPU, one thread"

    def export(self, fixed: LoweredModule, inputs: Sequence[torch.Tensor]) -> Exported:
        """Return the model as ONNX; see `Runtime.export`."""
        _installed("onnxruntime", "onnx")
        with tempfile.TemporaryDirectory() as folder:
            path = export(fixed, Path(folder) / "model.onnx", example_inputs=tuple(inputs))
            return _Onnx(path.read_bytes(), tuple(inputs))


@dataclass(frozen=True)
class _Onnx:
    content: bytes
    inputs: tuple[torch.Tensor, ...]

    def whole(self) -> Callable[[], object]:
        return self._session(self.content)

    def part(self, outputs: Sequence[int]) -> Callable[[], object]:
        import onnx
        from onnx.utils import Extractor

        model = onnx.load_from_string(self.content)
        given = [item.name for item in model.graph.input]
        wanted = [model.graph.output[place].name for place in outputs]
        part = Extractor(model).extract_model(given, wanted)
        read = {name for node in part.graph.node for name in node.input}
        unread = [item for item in part.graph.input if item.name not in read]
        for item in unread:
            part.graph.input.remove(item)
        names = dict(zip(given, self.inputs, strict=True))
        kept = tuple(names[item.name] for item in part.graph.input)
        return replace(self, inputs=kept)._session(part.SerializeToString())

    def _session(self, content: bytes) -> Callable[[], object]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_inputs()]
        arrays = (tensor.numpy() for tensor in self.inputs)
        feeds = dict(zip(names, arrays, strict=True))
        return lambda: session.run(None, feeds)


class Inductor:
    """PyTorch's compiler for x86, from an exported ``.pt2`` file.

    It compiles C++ for every network, so that a table takes hours.
    """

    name = "inductor"
    pairs: tuple[Pair, ...] = ((8, 8), (32, 32))

    @property
    def version(self) -> str:
        """Name and version."""
        return f"torch {torch.__version__}, Inductor with freezing, CPU, one thread"

    def export(self, fixed: LoweredModule, inputs: Sequence[torch.Tensor]) -> Exported:
        """Return the model as a program of `torch.export`; see `Runtime.export`."""
        with tempfile.TemporaryDirectory() as folder:
            path = export(fixed, Path(folder) / "model.pt2", example_inputs=tuple(inputs))
            return _Program(torch.export.load(path).module(), tuple(inputs))


@dataclass(frozen=True)
class _Program:
    module: nn.Module
    inputs: tuple[torch.Tensor, ...]

    def whole(self) -> Callable[[], object]:
        return self._compiled(self.module)

    def part(self, outputs: Sequence[int]) -> Callable[[], object]:
        return self._compiled(_Part(self.module, tuple(outputs)))

    def _compiled(self, module: nn.Module) -> Callable[[], object]:
        torch.set_num_threads(1)
        with _frozen(), torch.no_grad():
            compiled = torch.compile(module)
            compiled(*self.inputs)

        def call() -> object:
            with torch.no_grad():
                return compiled(*self.inputs)

        return call


class _Part(nn.Module):
    """Some of the outputs of a module."""

    def __init__(self, module: nn.Module, outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.module = module
        self.outputs = outputs

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        found = self.module(*inputs)
        return [found[place] for place in self.outputs]


def _frozen() -> AbstractContextManager[None]:
    from torch._inductor import config

    patched: AbstractContextManager[None] = config.patch(freezing=True)
    return patched


def _installed(package: str, extra: str) -> str:
    """Return the version of a package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise UsageError(
            f"measuring needs the package {package}, which is not installed; install it: "
            f"pip install {package} 'cgmq-fx[{extra}]'"
        ) from error


class Executorch:
    """ExecuTorch with XNNPACK on the CPU, from programs as a ``.pte`` file has them.

    It lowers every part of a network by itself, so that a table takes an hour or more.
    """

    name = "executorch"
    pairs: tuple[Pair, ...] = ((8, 8), (32, 32))

    @property
    def version(self) -> str:
        """Name and version."""
        return f"ExecuTorch {_installed('executorch', 'executorch')}, XNNPACK, CPU, one thread"

    def export(self, fixed: LoweredModule, inputs: Sequence[torch.Tensor]) -> Exported:
        """Return the model, which is lowered when it is run; see `Runtime.export`."""
        _installed("executorch", "executorch")
        return _Lowered(fixed, tuple(inputs))


@dataclass(frozen=True)
class _Lowered:
    fixed: LoweredModule
    inputs: tuple[torch.Tensor, ...]

    def whole(self) -> Callable[[], object]:
        return self._method(self.fixed)

    def part(self, outputs: Sequence[int]) -> Callable[[], object]:
        cut = copy.deepcopy(self.fixed)
        output = cut.graph.output_node()
        found = output.args[0]
        assert isinstance(found, tuple | list)
        output.args = (tuple(found[place] for place in outputs),)
        cut.graph.eliminate_dead_code()
        cut.recompile()
        return self._method(cut)

    def _method(self, module: LoweredModule) -> Callable[[], object]:
        content = executorch_program(module, self.inputs)
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime as Executor

        _unsafe_reset_threadpool(1)
        program = Executor.get().load_program(content)
        method = program.load_method("forward")

        def call(held: object = program) -> object:  # a method does not keep its program
            return method.execute(self.inputs)

        return call


_RUNTIMES: Mapping[str, Callable[[], Runtime]] = {
    item.name: item for item in (OnnxRuntime, Inductor, Executorch)
}


def runtime(name: str) -> Runtime:
    """Return the runtime called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in _RUNTIMES:
        raise UsageError(f"there is no runtime {name!r}; there is {', '.join(_RUNTIMES)}")
    return _RUNTIMES[name]()
