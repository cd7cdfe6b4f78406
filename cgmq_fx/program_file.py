"""``.pt2`` files: a program of `torch.export` and a manifest, checked against each other.

The tensors of the program are brought into the form of a packed file, so that the same checks and
the same digest hold; `cgmq_fx.program_grids` compares what the graph says of them.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cgmq_fx.container import (
    ITEM_BYTES,
    MAX_AXES,
    MAX_NAME,
    MAX_TENSORS,
    Container,
    FileFault,
    StoredTensor,
    are_counts,
    is_tensor_name,
    mapped_file,
    read_json,
)
from cgmq_fx.manifest_json import MAX_MANIFEST_BYTES, from_text
from cgmq_fx.packed_file import PackedFile, check_packed
from cgmq_fx.program_grids import packed_tensors
from cgmq_fx.program_json import read_graph
from cgmq_fx.zip_records import Bytes, zip_records

#: Name of the extra file that holds the manifest.
MANIFEST_RECORD = "cgmq_fx.json"
#: Types of tensors by their number in the archive.
_TYPES: Mapping[int, str] = {
    1: "U8", 2: "I8", 3: "I16", 4: "I32", 5: "I64", 6: "F16", 7: "F32", 8: "F64", 12: "BOOL",
    13: "BF16",
}  # fmt: skip
_STRIDED = 7
_MANIFEST = f"extra/{MANIFEST_RECORD}"
_GRAPH = "models/model.json"
_STATES = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_PLAIN = re.compile(r"data/(weights/weight_\d+|constants/tensor_\d+)")
_TEXTS = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little"}
_IGNORED = (".data/version", ".data/serialization_id")
_NO_PICKLE = "data/sample_inputs/model.pt"


def open_program(path: str | os.PathLike[str]) -> PackedFile:
    """Open a ``.pt2`` file that `export` wrote and check it; nothing in it is run or unpickled.

    Returns:
        The file as if it were a packed one: its weights as packed codes, its scales in pools.

    Raises:
        FileFormatError: it cannot be read, is damaged, holds what loading it would run, or its
            manifest, tensors and graph contradict each other.
    """
    label = os.fsdecode(path)
    fault = FileFault(label)
    data = mapped_file(path, label)
    records = _records(data, fault)
    manifest = from_text(records[_MANIFEST][: MAX_MANIFEST_BYTES + 1].tobytes(), fault)
    graph = read_graph(records[_GRAPH].tobytes(), fault)
    state: dict[str, StoredTensor] = {}
    for config in _STATES:
        state.update(_state(config, records, fault))
    tensors = packed_tensors(manifest, state, graph, fault)
    packed = PackedFile(Container(label, len(data), {}, tensors), manifest)
    check_packed(packed, fault)
    return packed


def _records(data: Bytes, fault: FileFault) -> Mapping[str, Bytes]:
    """Return the records of an archive without the folder around them; none may be a pickle."""
    found = {}
    roots = set()
    for name, content in zip_records(data, fault).items():
        root, _, rest = name.partition("/")
        roots.add(root)
        found[rest] = content
    if len(roots) != 1:
        raise fault(f"has records in {len(roots)} folders, not in one")
    for name, text in _TEXTS.items():
        if name not in found or found[name][:MAX_NAME].tobytes() != text:
            raise fault(f"has no record {name!r} that says {text.decode()!r}")
    needed = (_MANIFEST, _GRAPH, *_STATES)
    missing = [name for name in needed if name not in found]
    if missing:
        raise fault(f"has no records {missing}")
    for name, content in found.items():
        if name == _NO_PICKLE and content.size:
            raise fault(f"has a pickle, {name!r}, which loading it would run")
        if name not in (*needed, *_TEXTS, *_IGNORED, _NO_PICKLE) and not _PLAIN.fullmatch(name):
            raise fault(f"has a record {name!r}, which no exported file has")
    return found


def _state(
    config: str, records: Mapping[str, Bytes], fault: FileFault
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors that a record describes, by name."""
    raw = read_json(records[config].tobytes(), "list of tensors", fault)
    entries = raw.get("config") if isinstance(raw, dict) else None
    if not isinstance(entries, dict) or len(entries) > MAX_TENSORS:
        raise fault(f"has no list of at most {MAX_TENSORS:,} tensors in {config!r}")
    folder = config.rpartition("/")[0]
    for name, entry in entries.items():
        if not is_tensor_name(name) or not isinstance(entry, dict):
            raise fault(f"has a tensor called {name[:MAX_NAME]!r}, which is no name of a tensor")
        if entry.get("use_pickle") is not False:
            raise fault(f"has the tensor {name!r} as a pickle, which loading it would run")
        content = records.get(f"{folder}/{entry.get('path_name')}")
        if content is None:
            raise fault(f"has no bytes of the tensor {name!r}")
        try:
            yield name, _tensor(name, entry["tensor_meta"], content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            text = str(error)[:MAX_NAME]
            raise fault(f"describes the tensor {name!r} in another way ({text})") from None


def _tensor(name: str, meta: Any, content: Bytes) -> StoredTensor:
    dtype = _TYPES[meta["dtype"]]
    shape = [item["as_int"] for item in meta["sizes"]]
    strides = [item["as_int"] for item in meta["strides"]]
    if not are_counts(shape, MAX_AXES) or meta["layout"] != _STRIDED:
        raise ValueError(f"shape {str(shape)[:MAX_NAME]}")
    if meta["storage_offset"] != {"as_int": 0}:
        raise ValueError("it starts inside of its bytes")
    packed, step = [], 1
    for size in reversed(shape):
        packed.append(step)
        step *= max(1, size)
    packed.reverse()
    wanted = [(size, step) for size, step in zip(shape, packed, strict=True) if size > 1]
    found = [(size, step) for size, step in zip(shape, strides, strict=True) if size > 1]
    if found != wanted and math.prod(shape):
        raise ValueError(f"strides {str(strides)[:MAX_NAME]}")
    needed = math.prod(shape) * ITEM_BYTES[dtype]
    if content.size != needed:
        raise ValueError(f"{content.size:,} bytes, and its shape takes {needed:,}")
    return StoredTensor(name, dtype, tuple(shape), content)
