"""Writes a lowered module as ``.pte``: a program of ExecuTorch and the manifest."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cgmq_fx.container import FileFault
from cgmq_fx.errors import UsageError
from cgmq_fx.executorch_program import executorch_program, require_executorch
from cgmq_fx.export_packed import packed_content
from cgmq_fx.lowered import LoweredModule
from cgmq_fx.manifest import MANIFEST, POOL
from cgmq_fx.manifest_json import to_bytes
from cgmq_fx.pte_file import DIGEST, DIGEST_BYTES, PLACES, described, file_digest
from cgmq_fx.pte_finder import PlaceFinder
from cgmq_fx.pte_grids import PteGrids
from cgmq_fx.pte_places import to_text
from cgmq_fx.pte_reader import read_pte
from cgmq_fx.report import Report

_ALIGNMENT = 16
_SEGMENT_ALIGNMENT = 128


def write_pte(
    fixed: LoweredModule, contents: Report, path: Path, example_inputs: Sequence[Any] | None
) -> None:
    """Write `fixed` to a new file.

    Args:
        fixed: what `lower` returned.
        contents: its report.
        path: where to.
        example_inputs: one value for each argument of its forward; the batch of the program is any
            from 1 to theirs.

    Raises:
        UsageError: there are no example inputs, the package executorch is not installed, or the
            module is not computed in float32.
        UnsupportedModelError: torch.export or ExecuTorch cannot take the module; the message says
            why.
        CostTableError: a cost table is code, which no file can hold.
    """
    require_executorch()
    if example_inputs is None:
        raise UsageError(
            f"the export to {path.suffix} records the calls of {contents.model} on inputs; give "
            f"it some: cgmq_fx.export(fixed, path, example_inputs=(x,))"
        )
    tensors, manifest = packed_content(fixed, contents)
    program = executorch_program(fixed, example_inputs)
    fault = FileFault(contents.model)
    file = read_pte(np.frombuffer(program, np.uint8), fault)
    pools = {
        name: value.numpy().tobytes() for name, value in tensors.items() if name.startswith(POOL)
    }
    file = replace(file, named={**file.named, **{k: memoryview(v) for k, v in pools.items()}})
    grids = PteGrids(file, fault)
    places = PlaceFinder(fixed, grids).places()
    manifest = described(grids, manifest, places)
    own = {MANIFEST: to_bytes(manifest), PLACES: to_text(places), **pools}
    path.write_bytes(_with_digest(_with_named_data(program, own), fault))


def _with_named_data(program: bytes, own: dict[str, bytes]) -> bytes:
    """Return a program with more named data, and a digest that is not filled in."""
    from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
    from executorch.exir._serialize.data_serializer import DataEntry

    opened = deserialize_pte_binary(program)
    file: Any = getattr(opened, "pte_file", opened)
    held = file.named_data or NamedDataStoreOutput([], {}, {})
    for key, content in {**own, DIGEST: bytes(DIGEST_BYTES)}.items():
        held.pte_data[key] = DataEntry(len(held.buffers), _ALIGNMENT, None)
        held.buffers.append(content)
    file.named_data = held
    return bytes(
        serialize_pte_binary(
            file, extract_delegate_segments=True, segment_alignment=_SEGMENT_ALIGNMENT
        )
    )


def _with_digest(program: bytes, fault: FileFault) -> bytes:
    data = np.frombuffer(program, np.uint8)
    file = read_pte(data, fault)
    begin = file.places[DIGEST]
    return program[:begin] + file_digest(data, file) + program[begin + DIGEST_BYTES :]
