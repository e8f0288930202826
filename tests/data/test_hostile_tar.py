"""Tar files of unknown origin: bad members are rejected by name and reason, and no damage crashes."""

import gzip
import tarfile

import hostile
import numpy as np
import pytest

from rag_mm.data import captions, webdataset

PNG = hostile.encoded(hostile.pixels())
SPARSE = {
    "GNU.sparse.major": "0",
    "GNU.sparse.minor": "1",
    "GNU.sparse.size": "99999999",
    "GNU.sparse.numblocks": "1",
    "GNU.sparse.map": "0,10",
}
# Samples whose image has a bad name or header: the reason, and what differs in its header.
BAD_HEADERS = {
    "/absolute": ("leads-outside", dict()),
    "../above": ("leads-outside", dict()),
    "a/../../b": ("leads-outside", dict()),
    "soft": ("link", dict(type=tarfile.SYMTYPE, linkname="/etc/passwd", size=0)),
    "hard": ("link", dict(type=tarfile.LNKTYPE, linkname="good.png", size=0)),
    "char": ("device", dict(type=tarfile.CHRTYPE, size=0)),
    "block": ("device", dict(type=tarfile.BLKTYPE, size=0)),
    "pipe": ("device", dict(type=tarfile.FIFOTYPE, size=0)),
    "sparse": ("sparse-member", dict(pax_headers=SPARSE)),
}
BAD_CONTENTS = {
    "large": "oversized-member",
    "talkative": "oversized-member",
    "silent": "empty-caption",
    "blank": "empty-caption",
    "latin": "not-utf8",
    "b?": "not-utf8",
    "two": "duplicate-member",
    "broken": "not-json",
    "list": "not-json",
    "words": "no-picture",
    "drawing": "no-picture",
}


def fill_with_bad_members(tar):
    hostile.sample(tar, "good", PNG, b"good")
    for key, (_, changes) in BAD_HEADERS.items():
        hostile.sample(tar, key, PNG, b"caption", **changes)
    hostile.sample(tar, "large", bytes(3000), b"caption")
    hostile.sample(tar, "talkative", PNG, b"word " * 50)
    hostile.sample(tar, "silent", PNG, None)
    hostile.sample(tar, "blank", PNG, b" \n")
    hostile.sample(tar, "latin", PNG, "é".encode("latin-1"))
    hostile.sample(tar, "b\udcff", PNG, b"caption")
    hostile.sample(tar, "two", PNG, b"caption")
    hostile.member(tar, "two.jpg", hostile.encoded(hostile.pixels(), "JPEG"))
    hostile.member(tar, "broken.png", PNG)
    hostile.member(tar, "broken.json", b"{")
    hostile.member(tar, "list.png", PNG)
    hostile.member(tar, "list.json", b"[]")
    hostile.member(tar, "words.txt", b"no picture")
    hostile.member(tar, "drawing.svg", b"<svg>")
    hostile.sample(tar, "last", PNG, b"last")


@pytest.fixture(scope="module")
def items_of_bad_members(tmp_path_factory, make_tar):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webdataset, "MAX_MEMBER_BYTES", 2000)
        patch.setattr(captions, "MAX_TEXT_BYTES", 100)
        return list(make_tar(tmp_path_factory.mktemp("bad"), fill_with_bad_members).read(0))


def test_every_bad_member_is_rejected_with_its_reason(items_of_bad_members):
    reasons = {i.reject.name: i.reject.reason for i in items_of_bad_members if i.reject}
    assert reasons == {key: reason for key, (reason, _) in BAD_HEADERS.items()} | BAD_CONTENTS


def test_good_samples_around_bad_ones_are_read(items_of_bad_members):
    assert [i.document.id for i in items_of_bad_members if i.document] == ["good", "last"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_image_in_a_tar_is_read_or_rejected_as_in_a_folder(tmp_path, make_tar):
    """GIF files excepted: their ending is not one of an image, so they are no part of a sample."""
    images = {n: v for n, v in hostile.IMAGES.items() if not n.endswith(".gif")}

    def fill(tar):
        for name, (data, _) in images.items():
            stem, _, ending = name.partition(".")
            hostile.member(tar, f"{stem}-{ending}.{ending}", data)
            hostile.member(tar, f"{stem}-{ending}.txt", b"caption")

    items = list(make_tar(tmp_path, fill).read(0))
    for (name, (_, expected)), item in zip(images.items(), items, strict=True):
        actual = item.reject.reason if item.reject else set(item.notes)
        assert actual == expected, name


def cut_inside_a_member(data: bytes, third: int) -> bytes:
    return data[: third + 700]


def cut_inside_a_header(data: bytes, third: int) -> bytes:
    return data[: third + 100]


def overwrite_a_header(data: bytes, third: int) -> bytes:
    return data[:third] + b"\xff" * 512 + data[third + 512 :]


def compress(data: bytes, third: int) -> bytes:
    return gzip.compress(data)


def replace_by_an_image(data: bytes, third: int) -> bytes:
    return PNG


@pytest.mark.parametrize(
    ("damage", "reason", "num_good"),
    [
        (cut_inside_a_member, "truncated-tar", 1),
        (cut_inside_a_header, "truncated-tar", 1),
        (overwrite_a_header, "damaged-tar", 1),
        (compress, "not-a-tar", 0),
        (replace_by_an_image, "not-a-tar", 0),
    ],
)
def test_a_damaged_tar_is_rejected_once_and_the_next_one_is_read(
    tmp_path, make_tar, damage, reason, num_good
):
    """The damage begins at the third of four samples."""

    def fill(tar):
        for i in range(4):
            hostile.sample(tar, f"{i}", hostile.encoded(hostile.pixels(i, 30, 30)), b"caption")

    make_tar(tmp_path, fill)
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(damage(data, data.index(b"2.png")))
    (tmp_path / "c.tar").write_bytes(data)
    items = list(webdataset.TarSource([tmp_path / "b.tar", tmp_path / "c.tar"]).read(0))
    assert [i.reject.reason for i in items if i.reject] == [reason]
    assert len([i for i in items if i.document]) == num_good + 4


def test_no_flipped_bits_of_a_tar_crash(tmp_path, make_tar):
    """300 copies with three flipped bits each: every item is a document or a reject."""

    def fill(tar):
        for i in range(3):
            hostile.sample(tar, f"{i}", hostile.encoded(hostile.pixels(i)), b"caption")

    make_tar(tmp_path, fill)
    data = (tmp_path / "a.tar").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        for place in rng.integers(len(data) - 10_240 + 3000, size=3):
            changed[min(place, len(data) - 1)] ^= 1 << rng.integers(8)
        (tmp_path / "b.tar").write_bytes(changed)
        for item in webdataset.TarSource([tmp_path / "b.tar"]).read(0):
            assert (item.document is None) != (item.reject is None)
