import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cgmq_fx import native_library
from cgmq_fx.native_library import CACHE, CHOICE, load_library

HAS_COMPILER = load_library() is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C compiler")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Loading as in a new process, with an empty cache."""
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(CHOICE, raising=False)
    monkeypatch.delenv("CC", raising=False)
    return native_library.load_library.__wrapped__


@needs_compiler
def test_kernels_are_compiled_once_and_kept(fresh, tmp_path: Path, caplog):
    caplog.set_level(logging.INFO, "cgmq_fx")
    assert fresh() is not None
    (kept,) = (tmp_path / "cache").iterdir()
    before = kept.stat().st_mtime_ns
    assert fresh() is not None
    assert kept.stat().st_mtime_ns == before
    assert "compiled kernels" in caplog.text


def test_without_a_compiler_it_says_so_and_how_to_get_one(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler --fast")
    assert fresh() is None
    assert "no C compiler 'no-such-compiler'" in caplog.text
    assert "Install a C compiler" in caplog.text


def test_a_failing_compiler_is_reported(fresh, monkeypatch, tmp_path: Path, caplog):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'disk full' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert fresh() is None
    assert "disk full" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


@needs_compiler
def test_a_compiler_without_openmp_serves(fresh, monkeypatch, tmp_path: Path):
    compiler = tmp_path / "plain"
    compiler.write_text(
        '#!/bin/sh\nfor o in "$@"; do [ "$o" = -fopenmp ] && exit 1; done\nexec cc "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert fresh() is not None


def test_they_can_be_turned_off(fresh, monkeypatch, tmp_path: Path, caplog):
    caplog.set_level(logging.INFO, "cgmq_fx")
    monkeypatch.setenv(CHOICE, "torch")
    assert fresh() is None
    assert not (tmp_path / "cache").exists()
    assert "plain PyTorch" in caplog.text


def test_a_folder_of_another_user_is_not_trusted(fresh, monkeypatch, caplog):
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert fresh() is None
    assert "belongs to another user" in caplog.text


def test_a_folder_that_cannot_be_made_is_no_error(fresh, monkeypatch, tmp_path: Path, caplog):
    (tmp_path / "cache").write_text("a file")
    assert fresh() is None
    assert "plain PyTorch" in caplog.text


@needs_compiler
def test_processes_that_compile_at_once_all_get_it(tmp_path: Path):
    environment = {**os.environ, CACHE: str(tmp_path / "cache")}
    code = "from cgmq_fx.native_library import load_library; assert load_library() is not None"
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len(list((tmp_path / "cache").iterdir())) == 1
