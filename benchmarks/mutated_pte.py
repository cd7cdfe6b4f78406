"""Forgeries of ``.pte`` files: a changed manifest, changed places or a changed program, signed."""

import json
import random
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from mutations import changed

from cgmq_fx.container import FileFault
from cgmq_fx.errors import FileFormatError
from cgmq_fx.manifest import MANIFEST
from cgmq_fx.pte_file import DIGEST, DIGEST_BYTES, PLACES, file_digest
from cgmq_fx.pte_reader import read_pte

_ALIGNMENT = 128


def with_named(data: bytes, key: str, change: Callable[[bytes], bytes]) -> bytes:
    """Return a file in which the bytes of a key are others, with a digest that fits."""
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

    opened: Any = deserialize_pte_binary(data)
    file = getattr(opened, "pte_file", opened)
    held = file.named_data
    index = held.pte_data[key].buffer_index
    held.buffers[index] = change(bytes(held.buffers[index]))
    return signed(
        bytes(
            serialize_pte_binary(file, extract_delegate_segments=True, segment_alignment=_ALIGNMENT)
        )
    )


def with_manifest(data: bytes, change: Callable[[Any], Any]) -> bytes:
    """Return a file with another manifest, with a digest that fits."""

    def changed_text(text: bytes) -> bytes:
        return zlib.compress(json.dumps(change(json.loads(zlib.decompress(text)))).encode())

    return with_named(data, MANIFEST, changed_text)


def signed(data: bytes) -> bytes:
    """Return a file whose digest is its own; one that cannot be read stays as it is."""
    held = np.frombuffer(data, np.uint8)
    try:
        file = read_pte(held, FileFault("forged"))
        at = file.places[DIGEST]
    except (FileFormatError, KeyError):
        return data
    return data[:at] + file_digest(held, file) + data[at + DIGEST_BYTES :]


def _manifest(data: bytes, rng: random.Random) -> bytes:
    return with_manifest(data, lambda manifest: changed(manifest, rng))


def _places(data: bytes, rng: random.Random) -> bytes:
    def change(text: bytes) -> bytes:
        return json.dumps(changed(json.loads(text), rng)).encode()

    return with_named(data, PLACES, change)


def _program(data: bytes, rng: random.Random) -> bytes:
    """Change bytes of the program, of XNNPACK's graphs or of constants."""
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(mutated) // 4 * 4)
        mutated[at] = rng.choice((0, 1, 2, 127, 255, mutated[at] ^ 1 << rng.randrange(8)))
    return signed(bytes(mutated))


FORGED = (_manifest, _places, _program)
