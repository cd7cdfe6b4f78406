"""The C kernels: compiled once for this machine, kept in a cache, loaded; or the reason why not."""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

#: Set to ``torch``, no kernels are compiled and quantizers run in plain PyTorch.
CHOICE = "CGMQ_FX_KERNELS"
#: Folder of compiled kernels; by default ``cgmq_fx`` in the user's cache folder.
CACHE = "CGMQ_FX_CACHE"

_SOURCES = ("fake_quantize.c", "per_element.h", "rectified.h", "units.h")
# No contraction and no fast-math: values are those of plain PyTorch, bit for bit.
_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# From the fastest to what every compiler takes.
_MACHINES = (("-march=native", "-fopenmp"), ("-march=native",), ())
_PATIENCE = 120
_log = logging.getLogger("cgmq_fx")


@cache
def load_library() -> ctypes.CDLL | None:
    """Return the kernels, compiling them where no compiled ones are kept; None where that fails.

    What was chosen is said once, in the log ``cgmq_fx``.
    """
    if os.environ.get(CHOICE) == "torch":
        _log.info("quantizers run in plain PyTorch, as %s asks", CHOICE)
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning(
            "quantizers run in plain PyTorch, several times slower than compiled kernels: %s. "
            "Install a C compiler (cc, or the one that the variable CC names), or set %s=torch",
            _text(error),
            CHOICE,
        )
        return None
    _log.info("quantizers run in compiled kernels")
    return library


def _text(error: BaseException) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return f"{shlex.join(map(str, error.cmd))} failed: {error.stderr.strip()[-500:]}"
    return str(error)


def _compiled() -> Path:
    """Return the path of the compiled kernels, whose name is a hash of all that they depend on."""
    compiler = shlex.split(os.environ.get("CC", "")) or ["cc"]
    program = shutil.which(compiler[0])
    if program is None:
        raise FileNotFoundError(f"there is no C compiler {compiler[0]!r} on the PATH")
    folder = _folder()
    target = folder / f"kernels-{_key([program, *compiler[1:]])}.so"
    if not target.exists():
        _compile([program, *compiler[1:]], target)
    return target


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get(CACHE) or Path(base) / "cgmq_fx")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise PermissionError(f"the folder {folder} belongs to another user; set {CACHE}")
    return folder


def _key(compiler: list[str]) -> str:
    parts = [*compiler, *_FLAGS, platform.machine(), platform.system(), _processor()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for name in _SOURCES:
        digest.update((files("cgmq_fx") / "native" / name).read_bytes())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """Return what tells processors with different instructions apart: a home may be shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: list[str], target: Path) -> None:
    """Compile into a file of its own and move it in place: others may do the same at once."""
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        for source in _SOURCES:
            (folder / source).write_bytes((files("cgmq_fx") / "native" / source).read_bytes())
        output = folder / target.name
        for position, machine in enumerate(_MACHINES):
            command = [*compiler, *_FLAGS, *machine, str(folder / _SOURCES[0]), "-lm"]
            try:
                subprocess.run(
                    [*command, "-o", str(output)],
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=_PATIENCE,
                )
                break
            except subprocess.CalledProcessError:
                if position == len(_MACHINES) - 1:
                    raise
        output.replace(target)
