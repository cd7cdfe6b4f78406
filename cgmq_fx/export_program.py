"""Writes a lowered module as ``.pt2``: a program of `torch.export` and the manifest."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from cgmq_fx.errors import UnsupportedModelError, UsageError
from cgmq_fx.export_packed import packed_content
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.manifest_json import to_text
from cgmq_fx.passes.standard_quantization import StandardQuantization
from cgmq_fx.program_file import MANIFEST_RECORD
from cgmq_fx.report import Report
from cgmq_fx.standard_program import standard_program

_STRUCTURES = (tuple, list, dict, OrderedDict)


def write_program(
    fixed: LoweredModule, contents: Report, path: Path, example_inputs: Sequence[Any] | None
) -> None:
    """Write `fixed` to a new file.

    It holds no example inputs, which torch.export stores as a pickle, and no guards, which it runs
    as Python.

    Args:
        fixed: what `lower` returned.
        contents: its report.
        path: where to.
        example_inputs: one value for each argument of its forward.

    Raises:
        UsageError: there are no example inputs; a tensor has a name or a type that the format does
            not have; the module is not computed in float32.
        UnsupportedModelError: torch.export cannot take the module, or it returns objects of
            types of its own.
        CostTableError: a cost table is code, which no file can hold.
    """
    if example_inputs is None:
        raise UsageError(
            f"the export to {path.suffix} records the calls of {contents.model} on inputs; give "
            f"it some: cgmq_fx.export(fixed, path, example_inputs=(x,))"
        )
    _, manifest = packed_content(fixed, contents)
    names = [grid.name for grid in manifest.quantizers]
    program = standard_program(fixed, example_inputs, names, StandardQuantization())
    program._example_inputs = None
    program._guards_code = []
    _require_plain_structure(program, contents.model)
    text = to_text(manifest).decode()
    torch.export.save(program, path, extra_files={MANIFEST_RECORD: text})


def _require_plain_structure(program: ExportedProgram, model: str) -> None:
    """Refuse inputs and outputs of types that loading would have to import.

    Raises:
        UnsupportedModelError: there are some.
    """
    waiting = [program.call_spec.in_spec, program.call_spec.out_spec]
    while waiting:
        spec = waiting.pop()
        if spec is None or spec.is_leaf():
            continue
        if spec.type not in _STRUCTURES:
            raise UnsupportedModelError(
                f"{model} takes or returns a {spec.type.__name__}, which .pt2 does not hold: its "
                f"files name no types of Python code; return a tuple, a list or a dict of tensors, "
                f"or export to .safetensors"
            )
        waiting.extend(spec.children())
