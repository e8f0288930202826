"""Atomic writes replace regular files alone, follow no link, and leave permissions to the umask."""

import contextlib
import os
import pathlib
import stat

import pytest

from rag_mm.core import files
from rag_mm.core.errors import UserError


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: pathlib.Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def put(path: pathlib.Path, kind: str) -> pathlib.Path:
    """Puts something that is no regular file at `path`; returns the only other file there may be."""
    victim = path.with_name("victim")
    victim.write_text("precious")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(
            victim if kind == "link" else "/dev/null" if kind == "device" else "nowhere"
        )
    return victim


KINDS = ("pipe", "folder", "link", "device", "dangling link")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_neither_replaced_nor_followed(tmp_path, kind):
    victim = put(tmp_path / "page.html", kind)
    before = os.lstat(tmp_path / "page.html")
    with pytest.raises(UserError, match=r"page\.html is (a link|no regular file); remove it"):
        files.write_atomic(tmp_path / "page.html", b"new")
    assert os.lstat(tmp_path / "page.html") == before and victim.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["page.html", "victim"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make devices")
def test_a_device_stays_one(tmp_path):
    device = tmp_path / "full"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 7))
    except PermissionError:
        pytest.skip("this container may not make devices")
    with pytest.raises(UserError, match="no regular file"):
        files.write_atomic(device, b"new")
    assert stat.S_ISCHR(os.lstat(device).st_mode)


def test_files_and_folders_get_the_permissions_that_the_umask_leaves(tmp_path, umask):
    files.write_atomic(tmp_path / "a", b"new")
    with files.whole_folder(tmp_path / "b") as folder:
        (folder / "c").write_text("")
    assert mode(tmp_path / "a") == 0o666 & ~umask and mode(tmp_path / "b") == 0o777 & ~umask


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_atomic(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        files.write_atomic(tmp_path / "a", "no bytes")
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    """The one that ends last wins; neither writes into what the other has begun."""
    with files.whole_file(tmp_path / "a") as first, files.whole_file(tmp_path / "a") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "a").read_text() == "first" and os.listdir(tmp_path) == ["a"]


def test_a_file_that_is_not_finished_replaces_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    with contextlib.suppress(ValueError), files.whole_file(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ValueError
    with pytest.raises(FileNotFoundError), files.whole_file(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_folder_written_through_a_link_lies_where_the_link_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "target").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "target")
    with files.whole_folder(tmp_path / "out") as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "a").write_text("a")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "target" / "a").read_text() == "a"


@pytest.mark.parametrize("kind", KINDS)
def test_a_lock_that_is_no_regular_file_is_refused(tmp_path, kind):
    victim = put(tmp_path / ".lock", kind)
    with pytest.raises(UserError, match=r"\.lock is"):
        files.open_lock(tmp_path / ".lock")
    assert victim.read_text() == "precious" and not (tmp_path / "nowhere").exists()


def test_a_lock_keeps_what_is_in_it(tmp_path):
    (tmp_path / ".lock").write_text("kept")
    files.open_lock(tmp_path / ".lock").close()
    assert (tmp_path / ".lock").read_text() == "kept"
