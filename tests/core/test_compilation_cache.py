"""Compiled programs, which jax runs unchecked, lie in the user's own cache folder and never in a run."""

import os
import time

import jax
import pytest

from rag_mm.core import compilation_cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def unset():
    """jax without a cache folder, as where JAX_COMPILATION_CACHE_DIR is not set."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_folder_is_in_the_home_and_private(home):
    folder = compilation_cache.user_folder()
    assert folder == home / ".cache" / "rag_mm" / "programs"
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o700}


def test_xdg_cache_home_is_taken_if_it_is_absolute(home, monkeypatch):
    (home / "cache").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    assert compilation_cache.user_folder() == home / "cache" / "rag_mm" / "programs"
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert compilation_cache.user_folder() == home / ".cache" / "rag_mm" / "programs"


@pytest.mark.parametrize("value", ["", "relative", "/dev/null", "/nowhere/at/all"])
def test_without_a_home_nothing_is_kept(home, monkeypatch, unset, value):
    monkeypatch.setenv("HOME", value)
    compilation_cache.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None and not os.path.exists("/nowhere")
    monkeypatch.delenv("HOME")
    assert compilation_cache.user_folder() is None


def lay(folder, kind):
    """Puts a folder there into which somebody else could lay programs."""
    if kind == "a link":
        (folder.parent / "elsewhere").mkdir()
        folder.symlink_to(folder.parent / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod({"group": 0o770, "others": 0o757}[kind])


@pytest.mark.parametrize("kind", ["group", "others", "a link"])
@pytest.mark.parametrize("name", ["rag_mm", "rag_mm/programs"])
def test_a_folder_that_others_may_write_is_not_used(home, name, kind):
    (home / ".cache" / name).parent.mkdir(parents=True, mode=0o700)
    lay(home / ".cache" / name, kind)
    assert compilation_cache.user_folder() is None


def test_jax_is_told_the_folder_unless_it_has_one(home, unset):
    compilation_cache.keep_programs()
    programs = home / ".cache" / "rag_mm" / "programs"
    assert jax.config.jax_compilation_cache_dir == str(programs)
    jax.config.update("jax_compilation_cache_dir", str(home / "chosen"))
    compilation_cache.keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(home / "chosen")


def test_old_programs_are_deleted(home, unset):
    folder = compilation_cache.user_folder()
    for name, days in {"old": 40, "new": 20}.items():
        (folder / name).write_bytes(b"code")
        then = time.time() - days * 86400
        os.utime(folder / name, (then, then))
    compilation_cache.keep_programs()
    assert [path.name for path in folder.iterdir()] == ["new"]
