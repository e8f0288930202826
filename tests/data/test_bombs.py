"""Files of a few kB that would hang or fill the memory: tars, captions, links, pipes and pictures."""

import io
import json
import os
import tarfile
import time

import hostile
import numpy as np
import PIL.Image
import pytest

from rag_mm.core.errors import UserError
from rag_mm.data import image_decoding, open_documents, sources, webdataset

PNG = hostile.encoded(hostile.pixels())


@pytest.fixture(autouse=True)
def quick(bounded_memory):
    """No case may take long or much memory."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 10


@pytest.fixture
def bounded_memory():
    """Fails where a case needs more than 1 GiB beyond what the process has."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20


def header(name="a.png", size=0, kind=tarfile.REGTYPE, base256=False):
    """A tar header of a member that claims `size` bytes."""
    info = tarfile.TarInfo(name)
    info.type = kind
    buffer = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if base256:
        buffer[124:136] = b"\x80" + size.to_bytes(11, "big")
    else:
        buffer[124:136] = b"%011o\0" % size
    buffer[148:156] = b"%06o\0 " % (sum(buffer[:148]) + sum(buffer[156:512]) + 8 * 32)
    return bytes(buffer)


def blocks(data):
    return data + bytes(-len(data) % 512)


def pax(**settings):
    data = b""
    for key, value in settings.items():
        line = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(line) + len(str(len(line) + 3))
        data += str(length).encode() + line
    return header("pax", len(data), tarfile.XHDTYPE) + blocks(data)


DIGITS = b"9" * (1 << 20)
TARS = {
    "a size of 2^87": (header(size=1 << 87, base256=True), "truncated-tar"),
    "a size of 8 GB": (header(size=(8 << 30) - 1), "truncated-tar"),
    "a size by pax": (pax(size="9" * 30) + header(), "truncated-tar"),
    "a size of digits": (pax(size="9" * 5000) + header(), "empty-caption"),
    "a negative size": (pax(size=-(1 << 40)) + header(), "damaged-tar"),
    "pax digits": (header("x", 1 << 20, tarfile.XHDTYPE) + DIGITS + header(), "damaged-tar"),
    "an unknown kind": (header("a", 1 << 80, b"Z", base256=True), "truncated-tar"),
    "sparse without end": (
        pax(GNU__sparse__major=1, GNU__sparse__minor=0, GNU__sparse__name="a.png")
        + header(size=512)
        + blocks(b"1000000000\n"),
        "sparse-member",
    ),
    "headers of headers": (
        b"".join(header("L", 1, tarfile.GNUTYPE_LONGNAME) + blocks(b"a") for _ in range(3000)),
        "damaged-tar",
    ),
    **{
        f"a header {kind} of 8 GB": (header("x", (8 << 30) - 1, kind), "damaged-tar")
        for kind in (b"L", b"K", b"x", b"g", b"X")
    },
}


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(("data", "reason"), TARS.values(), ids=TARS)
def test_a_tar_bomb_is_a_reject(tmp_path, data, reason, is_first):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        if not is_first:
            hostile.sample(tar, "good", PNG, b"a caption")
    path = tmp_path / "a.tar"
    path.write_bytes(buffer.getvalue()[: 0 if is_first else 2048] + data + bytes(1024))
    items = list(webdataset.TarSource([path]).read(0))
    assert [i.reject.reason for i in items if i.reject] == [reason]


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_a_sparse_file_of_one_huge_header_is_not_read(tmp_path, kind):
    path = tmp_path / "a.tar"
    path.write_bytes(header("x", (8 << 30) - 1, kind))
    os.truncate(path, 9 << 30)
    items = list(webdataset.TarSource([path]).read(0))
    assert [item.reject.reason for item in items] == ["damaged-tar"]


def test_long_names_and_settings_are_read(tmp_path):
    name = "/".join(["sehr_langer_Ordner_猫_" * 3] * 20) + "/a"
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / f"{tar_format}.tar"
        with tarfile.open(path, "w", format=tar_format) as tar:
            for ending, data in (("png", PNG), ("txt", b"a caption")):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size, info.pax_headers = len(data), {"SCHILY.xattr.user.a": "x" * 20_000}
                tar.addfile(info, io.BytesIO(data))
        (item,) = webdataset.TarSource([path]).read(0)
        assert item.document.text == "a caption"


def folder(path, *lines):
    path.mkdir()
    (path / "a.png").write_bytes(PNG)
    rows = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (path / "captions.jsonl").write_bytes(b"\n".join(rows))
    return path


GOOD = {"image": "a.png", "caption": "a"}
LINES = {
    "NUL in a folder's name": ({"image": "a\0b/c.png", "caption": "a"}, "leads-outside"),
    "NUL in the name": ({"image": "a\0.png", "caption": "a"}, "leads-outside"),
    "a caption of 50 MB": ({"image": "a.png", "caption": "a " * (25 << 20)}, "too-long"),
    "a url of 2 MB": ({**GOOD, "url": "a" * (2 << 20)}, "too-long"),
    "deep": (b"[" * 100_000, "not-json"),
    "digits": (b'{"image": ' + b"9" * 100_000 + b"}", "not-json"),
    "a name of 5000": ({"image": "a" * 5000, "caption": "a"}, "missing-picture"),
}


@pytest.mark.parametrize(("line", "reason"), LINES.values(), ids=LINES)
def test_a_hostile_line_is_a_reject_and_the_next_is_read(tmp_path, line, reason):
    items = list(sources.FolderSource(folder(tmp_path / "a", line, GOOD)).read(0))
    assert items[0].reject.reason == reason and len(items[0].reject.detail) < 300
    assert items[1].document.text == "a"


@pytest.mark.parametrize("name", ["captions.jsonl", "x.arrayrecord", "x.tar"])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_a_pipe_or_device_is_not_read(tmp_path, name, kind):
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(kind)
    with pytest.raises(UserError, match="device or a pipe|not a tar file"):
        open_documents.open_documents(str(tmp_path / "a"))


def test_links_that_lead_outside_are_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(PNG)
    inside = folder(
        tmp_path / "a",
        GOOD,
        {"image": "b.png", "caption": "b"},
        {"image": "c/secret.png", "caption": "c"},
        {"image": "d.png", "caption": "d"},
    )
    (inside / "b.png").symlink_to("../secret.png")
    (inside / "c").symlink_to("..")
    (inside / "d.png").symlink_to("a.png")
    (tmp_path / "link").symlink_to("a")
    for directory in (inside, tmp_path / "link"):
        items = list(sources.FolderSource(directory).read(0))
        found = [item.reject.reason if item.reject else item.document.id for item in items]
        assert found == ["a", "leads-outside", "leads-outside", "d"]
    (inside / "captions.jsonl").rename(tmp_path / "captions.jsonl")
    (inside / "captions.jsonl").symlink_to("../captions.jsonl")
    with pytest.raises(UserError, match="a link that leads outside of the folder; copy the file"):
        sources.FolderSource(inside)


def progressive(num_scans):
    """A progressive JPEG whose last scan is repeated, each in a few bytes."""
    data = hostile.encoded(PIL.Image.new("RGB", (512, 512)), "JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    return data[:start] + data[start:-2] * (num_scans - data.count(b"\xff\xda") + 1) + b"\xff\xd9"


def test_a_jpeg_drawn_over_and_over_is_refused():
    assert image_decoding.decode(progressive(60)).pixels.shape == (512, 512, 3)
    with pytest.raises(image_decoding.BadImage, match="drawn more than 100 times") as caught:
        image_decoding.decode(progressive(20_000))
    assert caught.value.reason == "damaged"


def test_bytes_that_look_like_scans_are_none():
    data = hostile.encoded(hostile.pixels(), "JPEG", exif=b"Exif\0\0" + b"\xff\xda" * 1000)
    assert image_decoding.decode(data + b"\xff\xda" * 1000).pixels.shape == (6, 9, 3)


@pytest.mark.parametrize("shape", [(1, 1 << 26), (1 << 26, 1), (2, 65_537)])
def test_a_side_has_a_limit_as_pixels_have(shape):
    with pytest.raises(image_decoding.BadImage) as caught:
        image_decoding.decode(hostile.png_claiming(*shape))
    assert caught.value.reason == "too-many-pixels"
    long = np.zeros((1, 65_536, 3), np.uint8)
    assert image_decoding.decode(hostile.encoded(long)).pixels.shape == long.shape
