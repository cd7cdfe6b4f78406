"""Forgeries of ``.pt2`` files for `mutated_files`: sound archives of other records."""

import io
import json
import random
import zipfile
from collections.abc import Callable, Mapping

from mutations import changed

from cgmq_fx.program_file import MANIFEST_RECORD

NAMES = (
    "data/weights/weight_0",
    "data/sample_inputs/model.pt",
    "../../x",
    "/etc/passwd",
    "extra/x",
)


def records_of(data: bytes) -> dict[str, bytes]:
    """Return the records of an archive, by name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_records(records: Mapping[str, bytes]) -> bytes:
    """Return an archive of these records."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return file.getvalue()


def _json(ending: str) -> Callable[[bytes, random.Random], bytes]:
    def mutate(data: bytes, rng: random.Random) -> bytes:
        records = records_of(data)
        (name,) = (name for name in records if name.endswith(ending))
        value = changed(json.loads(records[name]), rng)
        return with_records({**records, name: json.dumps(value).encode()})

    mutate.__name__ = ending.partition(".")[0].strip("/")
    return mutate


def _record(data: bytes, rng: random.Random) -> bytes:
    """Leave out, rename, add, cut or repeat a record."""
    records = records_of(data)
    name = rng.choice(list(records))
    content = records[name]
    match rng.randrange(4):
        case 0:
            del records[name]
        case 1:
            records[f"sound/{rng.choice(NAMES)}"] = records.pop(name)
        case 2:
            records[f"sound/{rng.choice(NAMES)}"] = rng.randbytes(99)
        case _:
            records[name] = content[: rng.randrange(len(content) + 1)] * rng.randrange(3)
    return with_records(records)


FORGED = (
    _json("/models/model.json"),
    _json("/model_weights_config.json"),
    _json(f"/{MANIFEST_RECORD}"),
    _record,
)
