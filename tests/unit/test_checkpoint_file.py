import errno
import os
import resource
import subprocess
import sys
import textwrap

import pytest
import torch

from cgmq_fx.checkpoint_file import MAGIC, read_checkpoint, write_checkpoint
from cgmq_fx.errors import TrainingError, UsageError
from checkpoint_runs import Loop, differing, tensors_of

CONTENT = {"x": torch.arange(1000.0), "text": "a", "list": [1, (2.5, None)]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.ckpt"


def names(path):
    return sorted(item.name for item in path.parent.iterdir())


def is_whole(path, content=CONTENT):
    found = read_checkpoint(path)
    assert torch.equal(found["x"], content["x"])
    return found["list"] == content["list"]


def test_what_is_written_is_read(path):
    write_checkpoint(path, CONTENT)
    assert is_whole(path)
    assert names(path) == ["run.ckpt"]


def test_the_umask_and_not_a_private_mode_decides_who_may_read(path):
    write_checkpoint(path, CONTENT)
    (path.parent / "plain").touch()
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode


def test_a_link_stays_a_link(path):
    path.with_name("link").symlink_to(path)
    write_checkpoint(path.with_name("link"), CONTENT)
    assert path.with_name("link").is_symlink()
    assert is_whole(path)


def test_every_cut_is_found(path):
    write_checkpoint(path, CONTENT)
    data = path.read_bytes()
    for end in (0, 5, len(MAGIC), len(MAGIC) + 10, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(TrainingError, match=f"{path}.*(truncated|is empty|no checkpoint)"):
            read_checkpoint(path)
    path.write_bytes(data + b"x")
    with pytest.raises(TrainingError, match="has 1 bytes behind its end"):
        read_checkpoint(path)


def test_every_flipped_bit_is_found(path):
    write_checkpoint(path, {"x": 1})
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        with pytest.raises(TrainingError, match=str(path)):
            read_checkpoint(path)


def test_other_files_are_refused(path):
    torch.save({"x": 1}, path)
    with pytest.raises(TrainingError, match="is no checkpoint of cgmq_fx: it begins with b'PK"):
        read_checkpoint(path)
    path.write_bytes(b"cgmq_fx checkpoint 7\n" + bytes(100))
    with pytest.raises(TrainingError, match=r"has format 7, and this version .* reads format 1"):
        read_checkpoint(path)
    with pytest.raises(UsageError, match="there is no checkpoint"):
        read_checkpoint(path.with_name("none"))
    with pytest.raises(TrainingError, match="could not be read: Is a directory"):
        read_checkpoint(path.parent)
    write_checkpoint(path, {"x": 1})
    with pytest.raises(TrainingError, match="holds no training run"):
        Loop().resume(path)


def test_nothing_is_loaded_from_a_damaged_file(path):
    loop = Loop()
    loop.train(1)
    loop.save(path)
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)
    before = tensors_of(loop.prepared)
    with pytest.raises(TrainingError, match=r"is damaged: its content has the SHA-256"):
        loop.resume(path)
    assert differing(before, tensors_of(loop.prepared)) == []


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file(path, monkeypatch, function):
    write_checkpoint(path, CONTENT)

    def fail(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(TrainingError, match=f"{path}.*No space left on device.*as it was.*Free"):
        write_checkpoint(path, {"x": 0})
    assert is_whole(path)
    assert names(path) == ["run.ckpt"]


def test_a_disk_that_is_full_in_the_middle_leaves_file_and_training(path):
    """The system itself refuses to write beyond so many bytes."""
    loop = Loop()
    loop.train(1)
    loop.save(path)
    data, before = path.read_bytes(), tensors_of(loop.prepared)
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (10, 5_000, len(data) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
        try:
            with pytest.raises(TrainingError, match=f"{path}.* could not be written: File too la"):
                loop.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        assert path.read_bytes() == data
        assert names(path) == ["run.ckpt"]
    assert differing(before, tensors_of(loop.prepared)) == []


def test_a_folder_that_is_not_there_is_named(path):
    with pytest.raises(TrainingError, match=r"none/run.ckpt.*No such file or directory"):
        write_checkpoint(path.parent / "none" / "run.ckpt", CONTENT)


def test_a_kill_in_the_middle_of_a_write(path):
    """The old file is whole, and the next write removes what the killed one left."""
    write_checkpoint(path, CONTENT)
    program = textwrap.dedent(
        f"""
        import os, signal
        from cgmq_fx.checkpoint_file import write_checkpoint
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write_checkpoint({str(path)!r}, {{"x": 0}})
        """
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -9
    assert is_whole(path)
    assert len(names(path)) == 2
    mine = path.with_name(f".{path.name}.other-host-{os.getpid()}-0.part")
    mine.touch()
    write_checkpoint(path, CONTENT)
    assert names(path) == [mine.name, "run.ckpt"]
