"""A folder's list of checksums finds every changed or missing file, alone or with the work shared out."""

import pytest

from rag_mm.core import checksums, files
from rag_mm.core.errors import UserError

NAMES = ("a.bin", "sub/b.bin", "sub/deep/c.bin", ".hidden")


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 100)
    assert not checksums.exists(tmp_path)
    checksums.write(tmp_path)
    return tmp_path


def test_an_untouched_folder_is_as_listed(folder):
    assert checksums.exists(folder)
    assert sorted(files.read_json(folder / checksums.NAME)["files"]) == sorted(NAMES)
    checksums.check(folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_found_by_the_process_that_reads_the_file(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[50] ^= 4
    (folder / name).write_bytes(data)
    with pytest.raises(UserError, match="differs from its checksum"):
        checksums.check(folder)
    found = 0
    for part in range(3):
        try:
            checksums.check(folder, part, 3)
        except UserError:
            found += 1
    assert found == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_found_by_all(folder, name):
    (folder / name).unlink()
    for part in range(3):
        with pytest.raises(UserError, match="is missing"):
            checksums.check(folder, part, 3)


def test_a_file_added_later_and_what_a_killed_write_left_do_not_matter(folder):
    (folder / "more").write_bytes(b"more")
    (folder / f".{checksums.NAME}.abcd1234").write_bytes(b"half")
    checksums.check(folder)
    checksums.write(folder)
    assert sorted(files.read_json(folder / checksums.NAME)["files"]) == sorted((*NAMES, "more"))


@pytest.mark.parametrize("byte", [0, 30, -2])
def test_a_damaged_list_is_refused(folder, byte):
    data = bytearray((folder / checksums.NAME).read_bytes())
    data[byte] ^= 1
    (folder / checksums.NAME).write_bytes(data)
    with pytest.raises(UserError):
        checksums.check(folder)
