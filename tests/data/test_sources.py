"""A folder of strangers' pictures: what is good is read alike, what is bad is named."""

import contextlib
import io
import json
import pathlib
import struct
import unicodedata
import zlib

import numpy as np
import PIL.Image
import pytest

from rag_mm.core.errors import UserError
from rag_mm.data import sources


def gradient(height: int = 6, width: int = 9) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 20, columns * 20, rows * columns], axis=2).astype(np.uint8)


def save(path: pathlib.Path, pixels: np.ndarray, mode: str | None = None, **options) -> None:
    PIL.Image.fromarray(pixels, mode=mode).save(path, **options)


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    picture = gradient()
    gray = picture[:, :, 1]
    image = PIL.Image.fromarray(picture)
    image.save(tmp_path / "rgb.png")
    image.save(tmp_path / "rgb.webp", lossless=True)
    for name in ("rgb.png", "rgb.webp"):
        np.testing.assert_array_equal(sources.load_image(tmp_path / name), picture)
    image.save(tmp_path / "rgb.jpg", quality=95)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    flat = PIL.Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    flat.save(tmp_path / "flat.jpg", quality=95)
    assert np.abs(sources.load_image(tmp_path / "rgb.jpg").astype(int) - picture).mean() < 12
    assert sources.load_image(tmp_path / "cmyk.jpg").shape == picture.shape
    red = sources.load_image(tmp_path / "flat.jpg")[0, 0].astype(int)
    assert np.abs(red - [255, 0, 0]).max() < 8
    expected = np.repeat(gray[:, :, None], 3, axis=2)
    save(tmp_path / "gray.png", gray)
    save(tmp_path / "deep.png", gray.astype(np.uint16) << 8)
    image.convert("P", palette=PIL.Image.Palette.ADAPTIVE, colors=256).save(tmp_path / "p.png")
    PIL.Image.fromarray(gray > 90).save(tmp_path / "bits.png")
    PIL.Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    np.testing.assert_array_equal(sources.load_image(tmp_path / "gray.png"), expected)
    np.testing.assert_array_equal(sources.load_image(tmp_path / "deep.png"), expected)
    assert np.abs(sources.load_image(tmp_path / "p.png").astype(int) - picture).max() <= 20
    bits = sources.load_image(tmp_path / "bits.png")
    np.testing.assert_array_equal(bits, (expected > 90) * np.uint8(255))
    np.testing.assert_array_equal(sources.load_image(tmp_path / "dot.png"), [[[255, 0, 0]]])


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 255, 51)
    save(tmp_path / "rgba.png", pixels)
    found = sources.load_image(tmp_path / "rgba.png")
    np.testing.assert_array_equal(found[0, :, 0], [255, 0, 204])
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    np.testing.assert_array_equal(sources.load_image(tmp_path / "palette.png")[0, :, 0], [255, 9])


def test_the_camera_was_held_sideways(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # Turn a quarter to the right to see it upright.
    PIL.Image.fromarray(gradient()).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        sources.load_image(tmp_path / "turned.png"), np.rot90(gradient(), -1)
    )


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [PIL.Image.new("RGB", (3, 3), color) for color in ("red", "blue")]
    for name in ("a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert sources.load_image(tmp_path / name)[0, 0].tolist() == [255, 0, 0]


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header promises more than follows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "is not a JPEG, PNG or WebP image"),
        (b"hello", "is not a JPEG, PNG or WebP image"),
        (b"GIF89a" + bytes(100), "is not a JPEG, PNG or WebP image"),
        (png_claiming(30, 30), "is damaged"),
        (png_claiming(9000, 9000), "has more than 67,108,864 pixels"),
        (png_claiming(12000, 9000), "has more than 67,108,864 pixels"),
        (png_claiming(60000, 60000), "has more than 67,108,864 pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_pictures_are_refused_by_name(tmp_path, data, complaint):
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(UserError, match=f"bad.png {complaint}"):
        sources.load_image(tmp_path / "bad.png")


def test_missing_pictures_and_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no\.png cannot be read"):
        sources.load_image(tmp_path / "no.png")
    with pytest.raises(UserError, match="cannot be read"):
        sources.load_image(tmp_path)


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_no_damage_crashes_or_passes_silently_truncated(tmp_path, ending):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(buffer, format={"jpg": "JPEG"}.get(ending, ending))
    data = buffer.getvalue()
    path = tmp_path / f"x.{ending}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError):
        sources.load_image(path)
    rng = np.random.default_rng(1)
    for _ in range(100):
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        with contextlib.suppress(UserError):
            assert sources.load_image(path).dtype == np.uint8


def folder(path: pathlib.Path, lines: list) -> pathlib.Path:
    for i in range(3):
        save(path / f"{i}.png", gradient() + np.uint8(i))
    (path / "sub").mkdir()
    save(path / "sub" / "0.png", gradient())
    (path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    text = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (path / "captions.jsonl").write_bytes(b"\n".join(text))
    return path


def test_good_records_in_order_with_random_access(tmp_path):
    lines = [
        {"image": "2.png", "caption": "two", "url": "http://a/b", "license": "CC0"},
        {"image": "0.png", "caption": "zéro"},
        b"",
        {"image": "1.png", "caption": "one", "license": None},
    ]
    calls = []
    found = sources.FolderDocuments(folder(tmp_path, lines), lambda *call: calls.append(call))
    assert (len(found), found.rejects) == (3, [])
    assert [found[i].id for i in (2, 0, 1)] == ["1", "2", "0"]
    assert (found[0].text, found[0].url, found[0].license) == ("two", "http://a/b", "CC0")
    assert (found[1].text, found[1].url, found[2].license) == ("zéro", None, None)
    np.testing.assert_array_equal(found[0].image, gradient() + np.uint8(2))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(IndexError):
        found[3]


@pytest.mark.parametrize(("written", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_and_captions_in_either_unicode_form_are_one(tmp_path, written, stored):
    save(tmp_path / unicodedata.normalize(stored, "é.png"), gradient())
    caption = unicodedata.normalize(written, " café\r\n")
    fields = {"image": unicodedata.normalize(written, "é.png"), "caption": caption}
    (tmp_path / "captions.jsonl").write_text(json.dumps(fields, ensure_ascii=False))
    document = sources.FolderDocuments(tmp_path)[0]
    assert document.id == unicodedata.normalize("NFC", "é")
    assert document.text == unicodedata.normalize("NFC", "café")


def test_bad_records_are_skipped_and_named(tmp_path):
    good = {"image": "0.png", "caption": "zero"}
    bad = [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"image": "0.png", "caption": "\xff"}', "is not UTF-8"),
        (b'{"image": "1.png", "caption": "\\ud800"}', "surrogate"),
        (["0.png", "a"], "is not {"),
        ({"caption": "a"}, "is not {"),
        ({"image": "", "caption": "a"}, "names no file"),
        ({"image": "/etc/passwd", "caption": "a"}, "leads outside"),
        ({"image": "../x.png", "caption": "a"}, "leads outside"),
        ({"image": "sub/../../x.png", "caption": "a"}, "leads outside"),
        ({"image": "..\\x.png", "caption": "a"}, "leads outside"),
        ({"image": "C:x.png", "caption": "a"}, "leads outside"),
        ({"image": "a\0.png", "caption": "a"}, "leads outside"),
        ({"image": "1.png"}, "no caption"),
        ({"image": "1.png", "caption": "  "}, "no caption"),
        ({"image": "1.png", "caption": 3}, "no caption"),
        ({"image": "1.png", "caption": "a", "url": 3}, "url that is not text"),
        ({"image": "missing.png", "caption": "a"}, "cannot be read"),
        ({"image": "sub", "caption": "a"}, "cannot be read"),
        ({"image": "captions.jsonl", "caption": "a"}, "is not a JPEG"),
        ({"image": "broken.jpg", "caption": "a"}, "is "),
        ({"image": "0.png", "caption": "a"}, "has the id '0' of an earlier record"),
    ]
    found = sources.FolderDocuments(folder(tmp_path, [good, *(line for line, _ in bad)]))
    assert [found[i].id for i in range(len(found))] == ["0"]
    assert len(found.rejects) == len(bad)
    for (line, complaint), (name, reason) in zip(bad, found.rejects, strict=True):
        assert complaint in reason, (line, reason)
        assert name
    assert found.rejects[0][0] == "line 2"
    assert found.rejects[-1][0] == "0.png"


def test_folders_without_a_good_record_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        sources.FolderDocuments(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"captions\.jsonl cannot be read"):
        sources.FolderDocuments(tmp_path)
    (tmp_path / "captions.jsonl").write_text("")
    with pytest.raises(UserError, match=r"no good record.*is empty"):
        sources.FolderDocuments(tmp_path)
    (tmp_path / "captions.jsonl").write_text('{"image": "x.png", "caption": "a"}')
    with pytest.raises(UserError, match=r"no good record.*x\.png, which cannot be read"):
        sources.FolderDocuments(tmp_path)


def test_files_of_one_name_in_several_folders_are_documents_of_their_own(tmp_path):
    """Folders of classes, and endings that differ alone; one file twice is still a duplicate."""
    names = ["cat/0.png", "dog/0.png", "0.png", "0.webp", "a.b.png", "./c.png", "0.webp"]
    for place in ("cat", "dog"):
        (tmp_path / place).mkdir()
    for name in names:
        save(tmp_path / name, gradient())
    lines = [json.dumps({"image": name, "caption": "a"}) for name in names]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    found = sources.FolderDocuments(tmp_path)
    ids = [found[i].id for i in range(len(found))]
    assert ids == ["cat/0", "dog/0", "0", "0.webp", "a.b", "c"]
    assert [name for name, _ in found.rejects] == ["0.webp"]


def test_an_owner_without_a_name_is_no_matter(tmp_path, monkeypatch):
    """In containers the user ids of mounted files are often unknown."""

    def unknown(number):
        raise KeyError(f"uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("grp.getgrgid", unknown)
    save(tmp_path / "0.png", gradient())
    (tmp_path / "captions.jsonl").write_text('{"image": "0.png", "caption": "a"}')
    assert len(sources.FolderDocuments(tmp_path)) == 1
    assert sources.load_image(tmp_path / "0.png").shape == gradient().shape
