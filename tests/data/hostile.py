"""Records of unknown origin, each with the notes it is read with or the reason it is rejected for."""

import io
import json
import struct
import tarfile
import zlib

import numpy as np
import PIL.Image


def pixels(seed: int = 0, height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: PIL.Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes, flipped: int = 0) -> bytes:
    """A chunk of a PNG; `flipped` are bits that its checksum has wrong."""
    checksum = zlib.crc32(name + data) ^ flipped
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims more pixels than the file holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def _rotated() -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encoded(pixels(), exif=exif)


def _with(*chunks: bytes, at_end: bool = False, kind: str = "RGB") -> bytes:
    """A PNG of `pixels` with further chunks before its pixels or behind them."""
    data = encoded(PIL.Image.fromarray(pixels()).convert(kind))
    place = len(data) - 12 if at_end else 33
    return data[:place] + b"".join(chunks) + data[place:]


def _exif(kind: int, value: bytes) -> bytes:
    """EXIF data of one entry, the orientation."""
    return struct.pack("<2sHIHHHI4sI", b"II", 42, 8, 1, 0x0112, kind, 1, value, 0)


def _of_16_bits() -> bytes:
    """A PNG of 16-bit RGB whose first pixel is transparent."""
    values = (pixels().astype(np.uint16) * 256 + 5).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 6, 16, 2, 0, 0, 0))
    hole, body = chunk(b"tRNS", values[0, 0].tobytes()), chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + hole + body + chunk(b"IEND", b"")


def _of_a_phone() -> bytes:
    """A JPEG with a second one, such as a map of depths, behind it."""
    return encoded(pixels(), "MPO", save_all=True, append_images=[PIL.Image.fromarray(pixels(1))])


def _animated(kind: str) -> bytes:
    frames = [PIL.Image.new("RGB", (3, 3), color) for color in ("red", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


def _flipped() -> bytes:
    data = bytearray(encoded(pixels()))
    data[data.index(b"IDAT") + 12] ^= 0xFF
    return bytes(data)


def _palette_with_hole() -> bytes:
    image = PIL.Image.fromarray(pixels()).convert("P")
    return encoded(image, transparency=0)


_IMAGE = PIL.Image.fromarray(pixels())
# File name -> (content, the notes it is read with).
READ = {
    "plain.png": (encoded(_IMAGE), set()),
    "plain.jpg": (encoded(_IMAGE, "JPEG"), set()),
    "plain.webp": (encoded(_IMAGE, "WEBP"), set()),
    "cmyk.jpg": (encoded(_IMAGE.convert("CMYK"), "JPEG"), {"cmyk"}),
    "alpha.png": (encoded(_IMAGE.convert("RGBA")), {"alpha"}),
    "grey_alpha.png": (encoded(_IMAGE.convert("LA")), {"alpha", "grey"}),
    "deep.png": (
        encoded(PIL.Image.fromarray(pixels()[:, :, 0].astype(np.uint16) << 8)),
        {"16-bit"},
    ),
    "bits.png": (encoded(_IMAGE.convert("1")), {"1-bit"}),
    "palette.png": (encoded(_IMAGE.convert("P")), {"palette"}),
    "hole.png": (_palette_with_hole(), {"palette", "alpha"}),
    "grey.png": (encoded(_IMAGE.convert("L")), {"grey"}),
    "grey.jpg": (encoded(_IMAGE.convert("L"), "JPEG"), {"grey"}),
    "moving.png": (_animated("PNG"), {"animated"}),
    "moving.webp": (_animated("WEBP"), {"animated"}),
    "turned.png": (_rotated(), {"rotated"}),
    "turned_long_text.png": (
        _with(chunk(b"eXIf", _exif(3, b"\x06\0\0\0")), chunk(b"tEXt", b"a\0" + bytes(2 << 20))),
        {"rotated"},
    ),
    "phone.jpg": (_of_a_phone(), set()),
    "deep_hole.png": (_of_16_bits(), {"16-bit", "alpha"}),
    "really_a_png.jpg": (encoded(_IMAGE), {"wrong-ending"}),
    "really_a_jpeg.webp": (encoded(_IMAGE, "JPEG"), {"wrong-ending"}),
}
_MEGABYTES = bytes(3 << 20)
# As READ, all of the same pixels: what is wrong with their metadata is no matter.
ODD_METADATA = {
    "exif_text.png": (_with(chunk(b"eXIf", b"no exif data")), set()),
    "exif_empty.png": (_with(chunk(b"eXIf", b"")), set()),
    "exif_text.webp": (encoded(_IMAGE, "WEBP", exif=b"no exif data", lossless=True), set()),
    "turn_9.png": (_with(chunk(b"eXIf", _exif(3, b"\x09\0\0\0"))), set()),
    "turn_0.png": (_with(chunk(b"eXIf", _exif(3, bytes(4)))), set()),
    "turn_text.png": (_with(chunk(b"eXIf", _exif(2, b"6\0\0\0"))), set()),
    "turn_huge.png": (_with(chunk(b"eXIf", _exif(4, b"\xff\xff\xff\xee"))), set()),
    "long_packed.png": (_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(_MEGABYTES))), set()),
    "long_text.png": (_with(chunk(b"iTXt", b"a\0\0\0\0\0" + _MEGABYTES)), set()),
    "long_end.png": (_with(chunk(b"tEXt", b"a\0" + _MEGABYTES), at_end=True), set()),
    "many_texts.png": (_with(*[chunk(b"tEXt", b"a\0" + bytes(999_999))] * 70), set()),
    "long_profile.png": (_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(_MEGABYTES))), set()),
    "profile.png": (_with(chunk(b"iCCP", b"a\0\0" + b"not packed")), set()),
    "checksum.png": (_with(chunk(b"tEXt", b"a\0b", flipped=1)), set()),
    "checksum_end.png": (_with(chunk(b"tEXt", b"a\0b", flipped=1), at_end=True), set()),
    "profile.webp": (encoded(_IMAGE, "WEBP", icc_profile=_MEGABYTES, lossless=True), set()),
}
# File name -> (content, the reason it is rejected for).
REFUSED = {
    "nothing.png": (b"", "empty-file"),
    "dot.png": (encoded(pixels(0, 1, 1)), "one-pixel"),
    "half.jpg": (encoded(pixels(0, 40, 40), "JPEG")[:400], "truncated"),
    "half.png": (encoded(pixels())[:-40], "truncated"),
    "half.webp": (encoded(pixels(0, 40, 40), "WEBP")[:-40], "truncated"),
    "head.png": (encoded(pixels())[:20], "truncated"),
    "flipped.png": (_flipped(), "damaged"),
    "huge.png": (png_claiming(60_000, 60_000), "too-many-pixels"),
    "large.png": (png_claiming(9_000, 9_000), "too-many-pixels"),
    "moving.gif": (encoded(_IMAGE, "GIF"), "not-a-picture"),
    "gif.png": (encoded(_IMAGE, "GIF"), "not-a-picture"),
    "tiff.jpg": (encoded(_IMAGE, "TIFF"), "not-a-picture"),
    "text.png": (b"<svg onload=alert(1)>", "not-a-picture"),
    "page.jpg": (b"<!doctype html>" * 20, "not-a-picture"),
}
IMAGES = READ | REFUSED
# A line of captions.jsonl -> the reason it is rejected for; `good.png` is a good image.
LINES = {
    b"{": "not-json",
    b"[" * 100_000: "not-json",
    b'["good.png", "a"]': "not-json",
    b'{"caption": "a"}': "not-json",
    b'{"image": "", "caption": "a"}': "not-json",
    b'{"image": "good.png", "caption": "\xff"}': "not-utf8",
    b'{"image": "good.png", "caption": "\\ud800"}': "not-utf8",
    b'{"image": "/etc/passwd", "caption": "a"}': "leads-outside",
    b'{"image": "../good.png", "caption": "a"}': "leads-outside",
    b'{"image": "..\\\\good.png", "caption": "a"}': "leads-outside",
    b'{"image": "good.png"}': "empty-caption",
    b'{"image": "good.png", "caption": " "}': "empty-caption",
    b'{"image": "good.png", "caption": 3}': "empty-caption",
    b'{"image": "good.png", "caption": "a", "url": 3}': "bad-field",
    b'{"image": "missing.png", "caption": "a"}': "missing-picture",
    b'{"image": "sub", "caption": "a"}': "missing-picture",
    b'{"image": "pipe.png", "caption": "a"}': "device",
    b'{"image": "plain.png", "caption": "a twin"}': "duplicate-id",
}


def line(name: str, caption: str = "a caption") -> bytes:
    return json.dumps({"image": name, "caption": caption}).encode()


def member(tar: tarfile.TarFile, name: str, data: bytes = b"", **changes) -> None:
    """Adds a member whose header differs by `changes`."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def sample(tar: tarfile.TarFile, key: str, image: bytes, caption: bytes | None, **changes) -> None:
    member(tar, f"{key}.png", image, **changes)
    if caption is not None:
        member(tar, f"{key}.txt", caption)
