"""What does a damaged or hostile file do? It is refused, at once, or it says what it said before.

Mutations of a sound file: cut, flipped bits, bytes overwritten, inserted, deleted and repeated;
numbers, names and structure of the header and of the manifest changed, the latter with a sound
compression and digest, as a forger would. Run it with

    python benchmarks/mutated_files.py --mutations 2000 --output benchmarks/results/mutated_files.md

It ends with 1 where opening one raises anything but `FileFormatError`, takes `LIMIT_S` or more,
runs or loads code (by the audit events of the interpreter), or where a file that was damaged at
random is taken for sound though its numbers changed. `--suffix` names some formats.
"""

import argparse
import json
import random
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cgmq_fx.container import open_container
from cgmq_fx.errors import FileFormatError
from cgmq_fx.export import export
from cgmq_fx.load_packed import load_packed
from cgmq_fx.lower import lower
from cgmq_fx.manifest import MANIFEST
from cgmq_fx.onnx_file import open_onnx
from cgmq_fx.packed_file import content_digest
from cgmq_fx.prepare import prepare
from cgmq_fx.program_file import open_program
from cgmq_fx.pte_file import open_pte
from cgmq_fx.verify import Verification, verify

sys.path[:0] = [str(Path(__file__).parent)]  # the modules beside this script

import mutated_onnx  # noqa: E402
import mutated_programs  # noqa: E402
import mutated_pte  # noqa: E402
import pages  # noqa: E402
from mutations import changed  # noqa: E402

#: Seconds of the processor: opening waits for nothing, and other programs may run beside it.
LIMIT_S = 2.0
MAX_MESSAGE = 20_000
Mutation = Callable[[bytes, random.Random], bytes]


def sound_file(folder: Path, suffix: str = ".safetensors") -> Path:
    """Export a small network with convolutions, attention-free, at several widths."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 6, 3, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 10)),
    )
    inputs = torch.randn(2, 3, 10, 10)
    bounds = {"bops": "100%", "weight_memory": "100%", "peak_activation_memory": "100%"}
    prepared = prepare(model, bounds, example_inputs=(inputs,), widths=(2, 3, 4, 5, 8, 32)).eval()
    prepared(inputs)
    allowed = [site.allowed for site in prepared.plan.accounting.sites]
    prepared.set_bit_widths([bits[place % len(bits)] for place, bits in enumerate(allowed)])
    prepared(inputs)
    fixed = lower(prepared, allow_untrained=True)
    return export(fixed, folder / f"sound{suffix}", example_inputs=(inputs,))


# -- mutations -------------------------------------------------------------------------------------


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a file and the bytes behind it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, body: bytes) -> bytes:
    """Return a file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def manifest_of(data: bytes) -> dict[str, Any]:
    """Return the manifest of a file."""
    header, body = header_of(data)
    start, stop = header[MANIFEST]["data_offsets"]
    found: dict[str, Any] = json.loads(zlib.decompress(body[start:stop]))
    return found


def with_manifest(data: bytes, manifest: Any, *, compressed: bytes | None = None) -> bytes:
    """Return a file with another manifest, whose offsets are sound."""
    header, body = header_of(data)
    start, stop = header[MANIFEST]["data_offsets"]
    new = zlib.compress(json.dumps(manifest).encode()) if compressed is None else compressed
    grown = len(new) - (stop - start)
    for entry in header.values():
        entry["data_offsets"] = [at + grown if at >= stop else at for at in entry["data_offsets"]]
    header[MANIFEST] = {
        "dtype": "U8",
        "shape": [len(new)],
        "data_offsets": [start, start + len(new)],
    }
    return with_header(header, body[:start] + new + body[stop:])


def signed(data: bytes, folder: Path) -> bytes:
    """Return a file whose digest is that of its tensors."""
    path = folder / "unsigned.safetensors"
    path.write_bytes(data)
    manifest = manifest_of(data)
    manifest["sha256"] = content_digest(open_container(path).tensors.values())
    return with_manifest(data, manifest)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8, 64))):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data)), rng.randrange(1, 64)
    return (data[:at] + rng.randbytes(size) + data[at + size :])[: len(data)]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(rng.randrange(1, 64)) + data[at:]


def _delete(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randrange(1, 64) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at : at + rng.randrange(1, 512)] + data[at:]


def _header(data: bytes, rng: random.Random) -> bytes:
    header, body = header_of(data)
    return with_header(changed(header, rng), body)


def _manifest(data: bytes, rng: random.Random) -> bytes:
    return with_manifest(data, changed(manifest_of(data), rng))


RANDOM: tuple[Mutation, ...] = (
    _cut, _flip, _overwrite, _insert, _delete, _repeat,
)  # fmt: skip
#: Forgeries, and what opens a file besides `verify`, by suffix.
FORMATS: Mapping[str, tuple[tuple[Mutation, ...], tuple[Callable[[Path], object], ...]]] = {
    ".safetensors": ((_header, _manifest), (load_packed,)),
    ".pt2": (mutated_programs.FORGED, (open_program,)),
    ".pte": (mutated_pte.FORGED, (open_pte,)),
    ".onnx": (mutated_onnx.FORGED, (open_onnx,)),
    ".qonnx.onnx": (mutated_onnx.FORGED, (open_onnx,)),
}


# -- code ------------------------------------------------------------------------------------------

#: Audit events of what a file could make an interpreter run.
_RUNS_CODE = frozenset(
    {
        "exec", "compile", "import", "marshal.loads", "pickle.find_class", "ctypes.dlopen",
        "ctypes.dlsym", "code.__new__", "os.system", "os.exec", "os.fork", "os.forkpty",
        "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect",
    }
)  # fmt: skip


class _Watch:
    """Notes audit events while it is on; a hook of the interpreter stays for good."""

    def __init__(self) -> None:
        self.is_on, self.found = False, list[str]()
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_on and event in _RUNS_CODE:
            self.found.append(f"{event} {arguments[:1]}"[:200])


_WATCH = _Watch()


@contextmanager
def no_code() -> Iterator[None]:
    """Check that nothing is run or loaded within.

    Raises:
        AssertionError: something is.
    """
    _WATCH.found.clear()
    _WATCH.is_on = True
    try:
        yield
    finally:
        _WATCH.is_on = False
    assert not _WATCH.found, f"runs or loads code: {_WATCH.found[:3]}"


# -- judging ---------------------------------------------------------------------------------------


def judge(path: Path, suffix: str) -> tuple[str, Verification | None, float]:
    """Open a file in every way; return what came of it, its costs and the longest time."""
    longest, outcome, found = 0.0, "sound", None
    for opened in (verify, *FORMATS[suffix][1]):
        start = time.process_time()
        try:
            with no_code():
                result = opened(path)
            found = result if isinstance(result, Verification) else found
        except FileFormatError as error:
            outcome = "refused" if len(str(error)) < MAX_MESSAGE else "refused at length"
        longest = max(longest, time.process_time() - start)
    return outcome, found, longest


def _refuse_once(folder: Path, suffix: str) -> None:
    """Open a file that is none, so that all modules of ours are there."""
    path = folder / f"none{suffix}"
    path.write_bytes(b"none")
    for opened in (verify, *FORMATS[suffix][1]):
        try:
            opened(path)
        except FileFormatError:
            continue


def run(mutations: int, seed: int = 0, suffix: str = ".safetensors") -> tuple[Counter[str], float]:
    """Mutate, open and judge; return how often each came out how, and the longest time.

    Raises:
        AssertionError: a mutation does what none may.
    """
    rng = random.Random(seed)
    forged, _ = FORMATS[suffix]
    outcomes: Counter[str] = Counter()
    longest = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sound = sound_file(folder, suffix)
        data = sound.read_bytes()
        wanted = verify(sound).to_json()
        _refuse_once(folder, suffix)
        path = folder / f"mutated{suffix}"
        for number in range(mutations):
            mutate = rng.choice((*RANDOM, *forged, *forged))
            path.write_bytes(mutate(data, rng))
            place = f"mutation {number} of seed {seed} ({mutate.__name__.strip('_')})"
            try:
                outcome, found, seconds = judge(path, suffix)
            except Exception as error:
                raise AssertionError(f"{place} raises {type(error).__name__}: {error}") from error
            assert seconds < LIMIT_S, f"{place} takes {seconds:.1f} s"
            assert outcome != "refused at length", f"{place}: nobody can read the message"
            if mutate in RANDOM and found is not None:
                assert found.to_json() == wanted, f"{place} is taken for sound"
            outcomes[f"{mutate.__name__.strip('_')}: {outcome}"] += 1
            longest = max(longest, seconds)
    return outcomes, longest


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suffix", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows, faults = [], []
    for suffix in arguments.suffix:
        try:
            outcomes, longest = run(arguments.mutations, arguments.seed, suffix)
        except AssertionError as error:
            faults.append(f"{suffix}: {error}")
            print(faults[-1], flush=True)
            continue
        print(suffix)
        for outcome, count in sorted(outcomes.items()):
            print(f"{count:6} {outcome}")
        print(f"{arguments.mutations} mutations, none over {longest:.3f} s", flush=True)
        rows.append((f"`{suffix}`", *_counts(outcomes, suffix), f"{longest:.3f} s"))
    if arguments.output and not faults:
        columns = (
            "file",
            "damaged: refused",
            "says the same",
            "forged: refused",
            "taken",
            "slowest",
        )
        lines = [
            f"{pages.versions('torch')}; seed {arguments.seed}, {arguments.mutations} mutations of "
            "each format. Damaged: cut, flipped, overwritten, inserted, deleted or repeated bytes. "
            "Forged: other numbers, names and structure under a digest that fits; those that are "
            "taken are sound files of something else, as where a name changed. No file raised "
            "another error, took 2 s of the processor, or made the interpreter run or load code.",
            "",
            *pages.table(columns, rows),
        ]
        command = f"python benchmarks/mutated_files.py --mutations {arguments.mutations}"
        pages.write(arguments.output, "What damaged and forged files do", command, lines)
    if faults:
        sys.exit("\n".join(faults))


def _counts(outcomes: Counter[str], suffix: str) -> tuple[int, ...]:
    """Return how many damaged files were refused and taken, then how many forged ones."""
    kinds = (RANDOM, FORMATS[suffix][0])
    return tuple(
        sum(outcomes[f"{mutate.__name__.strip('_')}: {outcome}"] for mutate in kind)
        for kind in kinds
        for outcome in ("refused", "sound")
    )


if __name__ == "__main__":
    main()
