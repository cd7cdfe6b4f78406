"""Runs exported ONNX files in ONNX Runtime and in qonnx, on one thread."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

OPTIMIZED = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
UNOPTIMIZED = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

#: Without it x86 processors that have AVX2 and no VNNI add pairs of products of 8-bit codes in
#: 16 bits, which saturates (ONNX Runtime, "Quantize ONNX models", on U8S8).
EXACT = ("session.x64quantprecision", "1")


def session(path: Path, level: Any = OPTIMIZED, optimized: Path | None = None) -> Any:
    """Return a session of a file; `optimized` takes the graph that the runtime makes of it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    options.add_session_config_entry(*EXACT)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path: Path, inputs: Sequence[Tensor], level: Any = OPTIMIZED) -> list[Tensor]:
    """Return the outputs of a file, all of them."""
    opened = session(path, level)
    names = [item.name for item in opened.get_inputs()]
    given = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
    return [torch.from_numpy(np.asarray(found)) for found in opened.run(None, given)]


def run_qonnx(path: Path, inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the outputs of a QONNX file in qonnx's executor.

    None where that finds no shapes, as behind a GroupNormalization, and so runs nothing.
    """
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    model = ModelWrapper(str(path))
    names = [item.name for item in model.graph.input]
    for name, tensor in zip(names, inputs, strict=True):
        model.set_tensor_shape(name, list(tensor.shape))
    model = model.transform(InferShapes())
    if not model.check_all_tensor_shapes_specified():
        return None
    given = dict(zip(names, (tensor.numpy() for tensor in inputs), strict=True))
    return [torch.from_numpy(np.asarray(found)) for found in execute_onnx(model, given).values()]
