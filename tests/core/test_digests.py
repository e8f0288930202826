"""Two saves of the same arrays have equal digests, although Orbax never writes the same bytes twice."""

import contextlib
import shutil
import urllib.parse

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import v1 as ocp

from rag_mm.core import digests
from rag_mm.core.errors import UserError


def _save(folder, weight=0.0):
    state = {
        "w": jnp.arange(4096.0).reshape(64, 64).at[3, 5].set(weight),
        "b": jnp.ones(8, jnp.bfloat16),
        "step": jnp.int32(3),
    }
    with ocp.training.Checkpointer(epath.Path(folder)) as checkpointer:
        checkpointer.save_checkpointables(1, {"params": state})
    return folder


def test_same_arrays_same_digests(tmp_path):
    first, second = _save(tmp_path / "a"), _save(tmp_path / "b")
    stores = [next((folder / "1/params/d").iterdir()) for folder in (first, second)]
    assert stores[0].name != stores[1].name
    assert digests.folder_digests(first) == digests.folder_digests(second)
    assert "1/params/arrays" in digests.folder_digests(first)


def test_another_value_is_another_digest(tmp_path):
    first, second = _save(tmp_path / "a"), _save(tmp_path / "b", weight=1e-7)
    one, two = digests.folder_digests(first), digests.folder_digests(second)
    assert [name for name in one if one[name] != two[name]] == ["1/params/arrays"]


def test_a_flipped_bit_in_an_array_is_detected(tmp_path):
    folder = _save(tmp_path / "a")
    before = digests.folder_digests(folder)
    data = max((p for p in folder.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    data.write_bytes(flipped)
    # Depending on the bit, reading the store may fail first.
    with contextlib.suppress(UserError):
        assert digests.folder_digests(folder) != before


def test_unfinished_saves_are_skipped(tmp_path):
    folder = _save(tmp_path / "a")
    before = digests.folder_digests(folder)
    (folder / "2.orbax-checkpoint-tmp").mkdir()
    (folder / "2.orbax-checkpoint-tmp" / "x").write_bytes(b"half")
    (folder / ".log.jsonl.abcd1234").write_bytes(b"half")
    assert digests.folder_digests(folder) == before


def test_plain_files_are_digested_by_their_bytes(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("b")
    (tmp_path / "times.json").write_text("{}")
    found = digests.folder_digests(tmp_path, exclude=("times.json",))
    assert list(found) == ["a.npy", "sub/b.txt"]
    (tmp_path / "sub" / "b.txt").write_text("c")
    changed = digests.folder_digests(tmp_path, exclude=("times.json",))
    assert changed["a.npy"] == found["a.npy"] and changed["sub/b.txt"] != found["sub/b.txt"]


def test_an_unreadable_store_is_a_clear_error(tmp_path):
    folder = _save(tmp_path / "a")
    (folder / "1/params/manifest.ocdbt").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read"):
        digests.folder_digests(folder)


# As parts of a URL, a query, a fragment, a coded blank, a wrong code, a drive, a range of records.
ODD_NAMES = (
    "what?",
    "a#b",
    "a%20b",
    "50%",
    "c:d",
    "[0:3]",
    "é 🍎",
    "-x",
    "file:",
    "'\"",
)


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory):
    """Folders of the same arrays but for one value."""
    folder = tmp_path_factory.mktemp("saves")
    return _save(folder / "first"), _save(folder / "second", weight=2.0)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_arrays_are_found_under_any_name(tmp_path, two_saves, name):
    """The folder that a decoder of URLs would read instead holds other arrays."""
    first, second = two_saves
    decoded = urllib.parse.unquote(name).partition("#")[0].partition("?")[0]
    shutil.copytree(first, tmp_path / name)
    if decoded != name:
        shutil.copytree(second, tmp_path / decoded)
    assert digests.folder_digests(tmp_path / name) == digests.folder_digests(first)
    shutil.rmtree(tmp_path / name)
    shutil.copytree(second, tmp_path / name)
    assert digests.folder_digests(tmp_path / name) == digests.folder_digests(second)
    assert digests.folder_digests(second) != digests.folder_digests(first)
