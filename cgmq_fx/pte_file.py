"""``.pte`` files, opened: program, bytes and manifest checked against each other.

The tensors are brought into the form of a packed file, so that the same checks and the same digest
hold as for those.
"""

import hashlib
import os
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from cgmq_fx.container import Container, FileFault, mapped_file
from cgmq_fx.manifest import MANIFEST, OWN, Manifest
from cgmq_fx.manifest_json import MAX_MANIFEST_BYTES, from_bytes
from cgmq_fx.packed_file import PackedFile, check_packed, content_digest
from cgmq_fx.pte_grids import PteGrids
from cgmq_fx.pte_places import Place, from_text
from cgmq_fx.pte_reader import PteFile, read_pte
from cgmq_fx.stored_file import StoredFile, refuse
from cgmq_fx.xnnpack_reader import LAYERS, QINT8

#: Keys of what the format adds to a program, besides the manifest and the pools.
PLACES, DIGEST = f"{OWN}.places", f"{OWN}.sha256"
DIGEST_BYTES = 32


#: Operators of ExecuTorch that compute such layers, without XNNPACK.
_LAYER_OPERATORS = ("aten::convolution", "aten::addmm", "aten::linear", "aten::mm")


def open_pte(path: str | os.PathLike[str]) -> PackedFile:
    """Open a ``.pte`` file that `export` wrote and check it; nothing in it is run.

    Returns:
        The file as if it were a packed one: its weights as packed codes, its scales in pools.

    Raises:
        FileFormatError: it cannot be read, is damaged, or its manifest, bytes and program
            contradict each other.
    """
    return _opened(path)[0]


def stored_pte(path: str | os.PathLike[str]) -> StoredFile:
    """Open a file as `open_pte` does; return what `verify` reads, with a note on its layers."""
    packed, grids = _opened(path)
    int8, layers = int8_layers(grids)
    note = (
        f"{int8} of {layers} convolutions and linear layers are computed in int8; the others with "
        f"the real values of their grids, in float32"
    )
    return replace(packed.stored, notes=(note,))


def int8_layers(grids: PteGrids) -> tuple[int, int]:
    """Return how many convolutions and linear layers a program computes in int8, and of how many.

    A layer counts once for each of its calls.
    """
    nodes = [(graph, node) for graph in grids.graphs for node in graph.nodes if node.kind in LAYERS]
    int8 = sum(graph.values[node.output].kind == QINT8 for graph, node in nodes)
    others = sum(call.operator in _LAYER_OPERATORS for call in grids.file.calls)
    return int8, len(nodes) + others


def _opened(path: str | os.PathLike[str]) -> tuple[PackedFile, PteGrids]:
    label = os.fsdecode(path)
    fault = FileFault(label)
    data = mapped_file(path, label)
    file = read_pte(data, fault)
    for key in (MANIFEST, PLACES, DIGEST):
        if key not in file.named:
            raise fault(f"has no bytes {key!r}, with which cgmq_fx.export describes a model")
    found = file_digest(data, file)
    if found != bytes(file.named[DIGEST]):
        raise fault(f"has a SHA-256 that is {found.hex()}, not the one that it names")
    held = bytes(file.named[MANIFEST][: MAX_MANIFEST_BYTES + 1])
    manifest = from_bytes(held, fault)
    places = from_text(bytes(file.named[PLACES]), fault)
    grids = PteGrids(file, fault)
    refuse(fault, grids.faults(manifest, places))
    packed = PackedFile(Container(label, len(data), {}, grids.tensors), manifest)
    check_packed(packed, fault)
    return packed, grids


def file_digest(data: npt.NDArray[np.uint8], file: PteFile) -> bytes:
    """Return the SHA-256 of a file whose own digest is 0 bytes."""
    begin = file.places[DIGEST]
    digest = hashlib.sha256(data[:begin].data)
    digest.update(bytes(len(file.named[DIGEST])))
    digest.update(data[begin + len(file.named[DIGEST]) :].data)
    return digest.digest()


def described(grids: PteGrids, manifest: Manifest, places: list[Place]) -> Manifest:
    """Return the manifest of a new file.

    Args:
        grids: the program, with the pools among its bytes.
        manifest: of the module; its parameters are those that the file may hold.
        places: where its tensors stand.

    Raises:
        FileFormatError: the program is not what the manifest says, which a sound export never
            makes.
    """
    weights = {weight.name for weight in manifest.weights}
    others = sorted({place.name for place in places} - weights)
    parameters = tuple(name for name in others if name in manifest.parameters)
    buffers = tuple(name for name in others if name not in manifest.parameters)
    manifest = replace(manifest, parameters=parameters, buffers=buffers)
    refuse(FileFault(manifest.model), grids.faults(manifest, places))
    return replace(manifest, sha256=content_digest(grids.tensors.values()))
