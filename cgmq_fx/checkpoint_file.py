"""The file of a checkpoint: written whole or not at all, and read without running code.

A header of fixed size (`MAGIC`, the SHA-256 of what follows, its length) and then what `torch.save`
makes of plain data. The header is checked before anything is unpacked.
"""

import contextlib
import hashlib
import itertools
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from cgmq_fx.errors import TrainingError, UsageError

FORMAT = 1
_KIND = b"cgmq_fx checkpoint "
MAGIC = _KIND + b"%d\n" % FORMAT
_NUMBERS = struct.Struct("<32sQ")  # SHA-256 and length of what follows
_HEADER_SIZE = len(MAGIC) + _NUMBERS.size
_CHUNK = 2**20
_SUFFIX = ".part"
_counter = itertools.count()

Place = str | os.PathLike[str]


def write_checkpoint(path: Place, content: Any) -> None:
    """Write `content` to `path`: when it returns, the file is on the disk.

    It is written beside the old one and renamed, so that a kill or a full disk at any moment leaves
    the old one as it was.

    Args:
        path: the file; its folder exists.
        content: plain data, see `cgmq_fx.plain_data.plain`.

    Raises:
        TrainingError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f"{_stem(target)}{os.getpid()}-{next(_counter)}{_SUFFIX}")
    try:
        _remove_leftovers(target)
        with _new_file(part) as file:
            _fill(file, content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise TrainingError(
            f"the checkpoint {str(target)!r} could not be written: {error.strerror or error}; a "
            f"checkpoint that stood there is as it was, and so is the training in memory. Free "
            f"space on that disk or give a path in a folder that can be written to, and save again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _new_file(path: Path) -> BinaryIO:
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
    return open(os.open(path, flags, 0o666), "w+b", buffering=_CHUNK)


def _fill(file: BinaryIO, content: Any) -> None:
    file.write(MAGIC + _NUMBERS.pack(b"", 0))
    writer = _HashingWriter(file)
    try:
        torch.save(content, cast(BinaryIO, writer))
    except Exception:
        # torch reports a write that failed in words of its own.
        if writer.failure is not None:
            raise writer.failure from None
        raise
    file.seek(0)
    file.write(MAGIC + _NUMBERS.pack(writer.hash.digest(), writer.length))


class _HashingWriter:
    """What `torch.save` writes to: passes bytes on, and knows their hash, length and failure."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.length = file, hashlib.sha256(), 0
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write `data`, as a file does."""
        try:
            self.file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.hash.update(data)
        self.length += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing: the whole file is flushed at its end."""


def _sync_folder(folder: Path) -> None:
    """Make the new name last; where folders cannot be opened (Windows) the system does."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _stem(target: Path) -> str:
    host = re.sub(r"[^\w-]", "_", socket.gethostname())
    return f".{target.name}.{host}-"


def _remove_leftovers(target: Path) -> None:
    """Remove what writers of this file left that were killed on this machine."""
    if os.name != "posix":  # elsewhere there is no harmless way to ask whether a process lives
        return
    stem = _stem(target)
    for name in os.listdir(target.parent):
        process = name.removeprefix(stem).partition("-")[0]
        if name.startswith(stem) and name.endswith(_SUFFIX) and process.isdecimal():
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                (target.parent / name).unlink(missing_ok=True)
            except (OSError, OverflowError):
                continue  # it lives and is another user's, or it is no process's number


def read_checkpoint(path: Place) -> Any:
    """Return what `write_checkpoint` wrote; tensors are on the CPU.

    Raises:
        TrainingError: the file is truncated, damaged, of another kind, or cannot be read.
        UsageError: there is no such file.
    """
    try:
        with open(path, "rb") as file:
            _check(file, path)
            file.seek(_HEADER_SIZE)
            return _unpack(file, path)
    except FileNotFoundError as error:
        raise UsageError(
            f"there is no checkpoint {str(path)!r}; give the path that save_checkpoint or "
            f"fit(checkpoint=...) wrote to"
        ) from error
    except OSError as error:
        raise TrainingError(
            f"the checkpoint {str(path)!r} could not be read: {error.strerror or error}; give the "
            f"path of a file that you may read"
        ) from error


def _check(file: BinaryIO, path: Place) -> None:
    header = file.read(_HEADER_SIZE)
    if not header.startswith(MAGIC):
        raise _damaged(path, _other_kind(header))
    if len(header) < _HEADER_SIZE:
        raise _damaged(path, f"is truncated: it ends in its header, after {len(header)} bytes")
    digest, length = _NUMBERS.unpack(header[len(MAGIC) :])
    found, actual = hashlib.sha256(), 0
    for chunk in _chunks(file):
        found.update(chunk)
        actual += len(chunk)
    if actual < length:
        raise _damaged(path, f"is truncated: it holds {actual:,} of {length:,} bytes")
    if actual > length:
        raise _damaged(path, f"has {actual - length:,} bytes behind its end")
    if found.digest() != digest:
        wrong = f"its content has the SHA-256 {found.hexdigest()[:12]}..., not the one that it says"
        raise _damaged(path, f"is damaged: {wrong} ({digest.hex()[:12]}...)")


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _other_kind(header: bytes) -> str:
    if not header:
        return "is empty"
    number = header.removeprefix(_KIND).partition(b"\n")[0]
    if header.startswith(_KIND) and number.isdigit():
        return f"has format {number.decode()}, and this version of cgmq_fx reads format {FORMAT}"
    return f"is no checkpoint of cgmq_fx: it begins with {header[:16]!r}"


def _unpack(file: BinaryIO, path: Place) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever an unpickler says of bytes that it does not know
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise _damaged(
            path, f"holds more than plain data, which is not loaded ({reason})"
        ) from None


def _damaged(path: Place, what: str) -> TrainingError:
    return TrainingError(
        f"the file {str(path)!r} {what}; nothing was loaded. Give another checkpoint, or a copy of "
        f"this one from where it was whole"
    )
