"""Forgeries of ``.pte`` files for `mutated_files`: other content under a digest that is right."""

import json
import random
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from mutations import changed

from cgmq_fx.container import FileFault
from cgmq_fx.errors import FileFormatError
from cgmq_fx.manifest import MANIFEST
from cgmq_fx.pte_file import DIGEST, DIGEST_BYTES, PLACES, file_digest
from cgmq_fx.pte_reader import PteFile, read_pte


def opened(data: bytes) -> PteFile:
    """Return what the bytes of a file hold."""
    return read_pte(np.frombuffer(data, np.uint8), FileFault("file"))


def signed(data: bytes, place: int | None = None) -> bytes:
    """Return a file whose digest is that of its content; `place` is where the digest stands."""
    if place is None:
        place = opened(data).places[DIGEST]
    blank = data[:place] + bytes(DIGEST_BYTES) + data[place + DIGEST_BYTES :]
    try:
        file = opened(blank)
    except FileFormatError:
        return data
    if file.places.get(DIGEST) != place:
        return data
    digest = file_digest(np.frombuffer(blank, np.uint8), file)
    return data[:place] + digest + data[place + DIGEST_BYTES :]


def with_named(data: bytes, contents: Mapping[str, bytes]) -> bytes:
    """Return a file with other bytes under some of its keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the package's own import
        from executorch.exir._serialize._program import (
            deserialize_pte_binary,
            serialize_pte_binary,
        )
    file: Any = deserialize_pte_binary(data)
    for key, content in contents.items():
        file.named_data.buffers[file.named_data.pte_data[key].buffer_index] = content
    return signed(
        bytes(serialize_pte_binary(file, extract_delegate_segments=True, segment_alignment=128))
    )


def manifest_of(data: bytes) -> dict[str, Any]:
    """Return the manifest of a file."""
    found: dict[str, Any] = json.loads(zlib.decompress(bytes(opened(data).named[MANIFEST])))
    return found


def with_manifest(data: bytes, manifest: Any) -> bytes:
    """Return a file with another manifest."""
    return with_named(data, {MANIFEST: zlib.compress(json.dumps(manifest).encode())})


def _manifest(data: bytes, rng: random.Random) -> bytes:
    return with_manifest(data, changed(manifest_of(data), rng))


def _places(data: bytes, rng: random.Random) -> bytes:
    places = json.loads(bytes(opened(data).named[PLACES]))
    return with_named(data, {PLACES: json.dumps(changed(places, rng)).encode()})


def _named(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes of a weight, a scale or a pool, or their number."""
    named = opened(data).named
    key = rng.choice([key for key in named if key not in (MANIFEST, PLACES, DIGEST)])
    content = bytearray(named[key])
    match rng.randrange(3):
        case 0:
            content = content[: rng.randrange(len(content) + 1)]
        case 1:
            content += rng.randbytes(rng.randrange(1, 9))
        case _:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return with_named(data, {key: bytes(content)})


def _program(data: bytes, rng: random.Random) -> bytes:
    """Flip bits of the program, its tables and its header, or overwrite some of it."""
    return _struck(data, 0, int.from_bytes(data[16:24], "little"), rng)


def _delegate(data: bytes, rng: random.Random) -> bytes:
    """Flip bits of a part for XNNPACK, or overwrite some of it."""
    part = rng.choice(opened(data).delegates)
    begin = data.index(bytes(part))
    return _struck(data, begin, len(part), rng)


def _struck(data: bytes, begin: int, size: int, rng: random.Random) -> bytes:
    place = opened(data).places[DIGEST]
    changed_bytes = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = begin + rng.randrange(size)
        if rng.random() < 0.5:
            changed_bytes[at] ^= 1 << rng.randrange(8)
        else:
            number = rng.choice((0, 1, 4, 0x7FFFFFFF, 0xFFFFFFFF, size, rng.getrandbits(32)))
            word = number.to_bytes(4, "little")[: begin + size - at]
            changed_bytes[at : at + len(word)] = word
    return signed(bytes(changed_bytes), place)


FORGED: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _manifest, _places, _named, _program, _delegate,
)  # fmt: skip
