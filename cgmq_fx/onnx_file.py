"""``.onnx`` files, QDQ and QONNX, opened: graph, tensors and manifest checked against each other.

The tensors are brought into the form of a packed file, so that the same checks and the same digest
hold as for those.
"""

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace

from cgmq_fx.container import Container, FileFault, mapped_file
from cgmq_fx.manifest import Manifest
from cgmq_fx.manifest_json import MAX_MANIFEST_BYTES, from_bytes, to_bytes
from cgmq_fx.onnx_grids import GridReader
from cgmq_fx.onnx_reader import OnnxFile, read_onnx
from cgmq_fx.packed_file import PackedFile, check_packed, content_digest
from cgmq_fx.qdq_grids import QdqReader
from cgmq_fx.qonnx_grids import QonnxReader
from cgmq_fx.stored_file import refuse

QDQ, QONNX = "qdq", "qonnx"
#: Keys of the metadata.
KIND, MANIFEST_KEY, CARRIERS, DIGEST = (
    f"cgmq_fx.{name}" for name in ("format", "manifest", "carriers", "sha256")
)
_MAX_LISTED, _MAX_KIND = 10, 40


def open_onnx(path: str | os.PathLike[str]) -> PackedFile:
    """Open an ``.onnx`` file that `export` wrote and check it; nothing in it is run.

    Returns:
        The file as if it were a packed one: its weights as packed codes, its scales in pools.

    Raises:
        FileFormatError: it cannot be read, is damaged, or its metadata, tensors and graph
            contradict each other.
    """
    label = os.fsdecode(path)
    fault = FileFault(label)
    data = mapped_file(path, label)
    file = read_onnx(data, fault)
    manifest = _manifest(file, fault)
    found = hashlib.sha256(file.head).hexdigest()
    if found != file.metadata[DIGEST]:
        raise fault(f"has a graph whose SHA-256 is {found}, not {file.metadata[DIGEST][:64]!r}")
    reader = _grids(file, manifest, file.metadata[KIND], fault)
    refuse(fault, reader.state_faults())
    if file.metadata[CARRIERS] != _text(reader.carriers):
        raise fault("has metadata that name other types of codes than its graph has")
    packed = PackedFile(Container(label, len(data), {}, reader.tensors), manifest)
    check_packed(packed, fault)
    return packed


def described(file: OnnxFile, manifest: Manifest, kind: str) -> tuple[Manifest, dict[str, str]]:
    """Return the manifest of a new file, and its metadata.

    Args:
        file: the graph, without metadata.
        manifest: of the module; its parameters are those that the file may hold.
        kind: `QDQ` or `QONNX`.

    Raises:
        FileFormatError: the graph is not what the manifest says, which a sound export never makes.
    """
    fault = FileFault(manifest.model)
    reader = _grids(file, manifest, kind, fault)
    parameters = tuple(name for name in reader.others if name in manifest.parameters)
    buffers = tuple(name for name in reader.others if name not in manifest.parameters)
    reader.manifest = manifest = replace(manifest, parameters=parameters, buffers=buffers)
    refuse(fault, reader.state_faults())
    digest = content_digest(reader.tensors.values())
    manifest = replace(manifest, sha256=digest)
    return manifest, {
        KIND: kind,
        DIGEST: hashlib.sha256(file.head).hexdigest(),
        CARRIERS: _text(reader.carriers),
        MANIFEST_KEY: base64.b64encode(to_bytes(manifest)).decode(),
    }


def _manifest(file: OnnxFile, fault: FileFault) -> Manifest:
    keys = {KIND, MANIFEST_KEY, CARRIERS, DIGEST}
    if set(file.metadata) != keys:
        raise fault(f"has the metadata {sorted(file.metadata)[:_MAX_LISTED]}, not {sorted(keys)}")
    text = file.metadata[MANIFEST_KEY]
    if len(text) > 2 * MAX_MANIFEST_BYTES:
        raise fault(f"has a manifest of {len(text):,} characters")
    try:
        return from_bytes(base64.b64decode(text, validate=True), fault)
    except (binascii.Error, ValueError) as error:
        raise fault(f"has a manifest that is no base64 ({error})") from error


def _grids(file: OnnxFile, manifest: Manifest, kind: str, fault: FileFault) -> GridReader:
    if kind not in _READERS:
        raise fault(f"has the format {kind[:_MAX_KIND]!r}, not {QDQ!r} or {QONNX!r}")
    reader = _READERS[kind](manifest, file)
    refuse(fault, reader.grid_faults())
    return reader


def _text(carriers: Mapping[str, str]) -> str:
    return json.dumps(carriers, separators=(",", ":"), sort_keys=True)


_READERS: Mapping[str, type[GridReader]] = {QDQ: QdqReader, QONNX: QonnxReader}
