"""A lock that another process holds is told from a disk that has no locks."""

import errno
import fcntl
import os

import pytest

from rag_mm.core import locks, run_folder
from rag_mm.core.errors import UserError
from rag_mm.memory.writing import writer


def failing(number):
    def lock(file, flags):
        raise OSError(number, os.strerror(number))

    return lock


def write_run(folder):
    with run_folder.Run(folder).locked():
        (folder / "written").touch()


def write_memory(folder):
    with writer._lock(folder):
        (folder / "written").touch()


@pytest.fixture(params=[(write_run, "lockf"), (write_memory, "flock")], ids=["run", "memory"])
def write(request, monkeypatch):
    """Writes under the lock of a run or a memory, where locking fails with an error number, if any."""
    act, name = request.param

    def write(folder, number=None):
        if number is not None:
            monkeypatch.setattr(fcntl, name, failing(number))
        act(folder)

    return write


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_written_with_a_warning(tmp_path, write, number, capsys):
    write(tmp_path, number)
    assert (tmp_path / "written").exists()
    assert f"The disk of {tmp_path} has no locks" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_another_process_is_named_where_it_holds_the_lock(tmp_path, write, number, capsys):
    with pytest.raises(UserError, match=r"nother process"):
        write(tmp_path, number)
    assert not (tmp_path / "written").exists()
    assert "no locks" not in capsys.readouterr().err


def test_another_failure_is_neither(tmp_path, write):
    with pytest.raises((UserError, OSError), match="Input/output error"):
        write(tmp_path, errno.EIO)
    assert not (tmp_path / "written").exists()


def test_a_lock_that_is_held_is_not_taken_twice(tmp_path):
    with (tmp_path / ".lock").open("wb") as first, (tmp_path / ".lock").open("wb") as second:
        assert locks.take(first, tmp_path, fcntl.flock)
        assert not locks.take(second, tmp_path, fcntl.flock)
