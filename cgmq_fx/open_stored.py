"""Opens an exported file by what its first bytes say, whatever its name is."""

import os
from collections.abc import Callable

from cgmq_fx.container import mapped_file
from cgmq_fx.onnx_file import open_onnx
from cgmq_fx.packed_file import open_packed
from cgmq_fx.program_file import open_program
from cgmq_fx.pte_file import stored_pte
from cgmq_fx.pte_reader import MAGIC
from cgmq_fx.stored_file import StoredFile

_START_BYTES = 16


def open_stored(path: str | os.PathLike[str]) -> StoredFile:
    """Open a file that `export` wrote and check it; nothing in it is run.

    Raises:
        FileFormatError: it cannot be read, is damaged, or its manifest and its tensors contradict
            each other; the message lists what does.
    """
    start = mapped_file(path, os.fsdecode(path))[:_START_BYTES].tobytes()
    openers = (opener for starts, opener in _FORMATS if starts(start))
    return next(openers, _open_packed)(path)


def _open_packed(path: str | os.PathLike[str]) -> StoredFile:
    return open_packed(path).stored


def _open_onnx(path: str | os.PathLike[str]) -> StoredFile:
    return open_onnx(path).stored


def _open_program(path: str | os.PathLike[str]) -> StoredFile:
    return open_program(path).stored


def _starts_pte(start: bytes) -> bool:
    """Tell whether a program of ExecuTorch starts."""
    return start[4:8] == MAGIC


def _starts_archive(start: bytes) -> bool:
    """Tell whether a ZIP archive starts, as those of torch.export are."""
    return start.startswith(b"PK\3\4")


def _starts_model(start: bytes) -> bool:
    """Tell whether a protobuf message starts whose first field is a number, as an ONNX model's."""
    return start.startswith(b"\x08")


def _starts_packed(start: bytes) -> bool:
    """Tell whether a JSON header follows its length."""
    return start[8:9] == b"{"


#: What tells a format by the first bytes of a file, and what opens it; the first that does, does.
_FORMATS: tuple[
    tuple[Callable[[bytes], bool], Callable[[str | os.PathLike[str]], StoredFile]], ...
] = (
    (_starts_archive, _open_program),
    (_starts_pte, stored_pte),
    (_starts_packed, _open_packed),
    (_starts_model, _open_onnx),
)
