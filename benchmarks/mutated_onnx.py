"""Forgeries of ``.onnx`` files for `mutated_files`: sound messages of other content."""

import base64
import hashlib
import json
import random
import zlib
from collections.abc import Callable
from typing import Any

import onnx
from mutations import NAMES, changed

from cgmq_fx.onnx_file import DIGEST, KIND, MANIFEST_KEY

_NUMBERS = (0, -1, 1, 7, 2**31 - 1, 2**40, 2**62, -(2**63))
_OPERATORS = ("QuantizeLinear", "DequantizeLinear", "Clip", "Loop", "If", "Quant", "Identity")


def signed(model: onnx.ModelProto) -> bytes:
    """Return the bytes of a model whose digest is that of its graph."""
    head = onnx.ModelProto()
    head.CopyFrom(model)
    del head.metadata_props[:]
    for entry in model.metadata_props:
        if entry.key == DIGEST:
            entry.value = hashlib.sha256(head.SerializeToString()).hexdigest()
    return model.SerializeToString()


def _other(value: object, rng: random.Random) -> Any:
    """Return a value of the same type, which the field can hold."""
    match value:
        case bool() | float():
            return rng.choice((0.0, -1.0, 1e38))
        case int():
            return rng.choice((*_NUMBERS, value + 1, value - 1)) % 2**31
        case bytes():
            at = rng.randrange(len(value) + 1)
            return rng.choice(
                (value[:at], value[at:] + rng.randbytes(4), rng.randbytes(len(value)))
            )
        case _:
            return rng.choice((*NAMES, *_OPERATORS, f"{value}0"))


def change(message: Any, rng: random.Random) -> None:
    """Change something in a message: a field, an element of a list, or something deeper."""
    field, value = rng.choice(message.ListFields())
    if not field.is_repeated:
        if field.message_type is not None:
            change(value, rng)
        elif rng.random() < 0.2:
            message.ClearField(field.name)
        elif field.enum_type is not None:
            setattr(message, field.name, rng.choice(list(field.enum_type.values_by_number)))
        else:
            setattr(message, field.name, _other(value, rng))
        return
    place, choice = rng.randrange(len(value)), rng.random()
    if choice < 0.1:
        del value[place]
    elif choice < 0.2:
        value.append(value[place])
    elif field.message_type is not None:
        change(value[place], rng)
    else:
        value[place] = _other(value[place], rng)


def _graph(data: bytes, rng: random.Random) -> bytes:
    model = onnx.load_from_string(data)
    for _ in range(rng.choice((1, 1, 2))):
        change(model.graph, rng)
    return signed(model)


def _metadata(data: bytes, rng: random.Random) -> bytes:
    """Change a key or a text of the metadata, leave one out or give it twice."""
    model = onnx.load_from_string(data)
    entry = rng.choice(model.metadata_props)
    match rng.randrange(4):
        case 0:
            model.metadata_props.remove(entry)
        case 1:
            model.metadata_props.append(entry)
        case 2:
            entry.key = rng.choice((*NAMES, KIND))
        case _:
            entry.value = rng.choice((*NAMES, "qdq", "qonnx", entry.value[1:], "A" * 99_999))
    return model.SerializeToString()


def _manifest(data: bytes, rng: random.Random) -> bytes:
    model = onnx.load_from_string(data)
    (entry,) = (item for item in model.metadata_props if item.key == MANIFEST_KEY)
    manifest = changed(json.loads(zlib.decompress(base64.b64decode(entry.value))), rng)
    packed = zlib.compress(json.dumps(manifest).encode())
    entry.value = base64.b64encode(packed).decode()
    return model.SerializeToString()


FORGED: tuple[Callable[[bytes, random.Random], bytes], ...] = (_graph, _metadata, _manifest)
