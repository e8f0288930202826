"""More than 300 image files, each with what it is read as or the reason it is rejected for.

All are of two colors: one from the upper left corner to 8 pixels right and down, another elsewhere, both
given in the file's own mode. What is expected follows from rules: the colors of `MODES`, the corner and the
sides that an orientation leads to, and one reason for each kind of damage.
"""

import dataclasses
import itertools
import struct
import zlib
from collections.abc import Iterator

import hostile
import numpy as np
import PIL.Image
from hostile import chunk, encoded

BLOCK = 8
# Mode -> (the first color, the other one, the first as RGB, notes). 51 is a fifth of 255.
MODES = {
    "RGB": ((200, 30, 60), (10, 120, 240), (200, 30, 60), set()),
    "L": (200, 40, (200, 200, 200), {"grey"}),
    "1": (255, 0, (255, 255, 255), {"1-bit"}),
    "I;16": (200 * 256 + 77, 40 * 256, (200, 200, 200), {"16-bit"}),
    "P": ((200, 30, 60), (10, 120, 240), (200, 30, 60), {"palette"}),
    "LA": ((200, 51), (40, 255), (244, 244, 244), {"grey", "alpha"}),
    "LA clear": ((200, 0), (40, 255), (255, 255, 255), {"grey", "alpha"}),
    "RGBA": ((200, 30, 60, 51), (10, 120, 240, 255), (244, 210, 216), {"alpha"}),
    "RGBA clear": ((200, 30, 60, 0), (10, 120, 240, 255), (255, 255, 255), {"alpha"}),
    "RGBA full": ((200, 30, 60, 255), (10, 120, 240, 254), (200, 30, 60), {"alpha"}),
    "CMYK": ((255, 0, 0, 0), (0, 0, 255, 0), (0, 255, 255), {"cmyk"}),
}
PNG_MODES = [mode for mode in MODES if mode != "CMYK"]
WEBP_MODES = ["RGB", "RGBA", "RGBA clear"]
JPEG_MODES = ["RGB", "L", "CMYK"]
SIZES = [(1, 2), (2, 1), (7, 5), (16, 24), (40, 3), (3, 300)]  # height, width
SIDE = (16, 24)
# Orientation -> the corner that the upper left one is brought to (0 or -1: row, column).
CORNERS = {
    1: (0, 0),
    2: (0, -1),
    3: (-1, -1),
    4: (-1, 0),
    5: (0, 0),
    6: (0, -1),
    7: (-1, -1),
    8: (-1, 0),
}


@dataclasses.dataclass(frozen=True)
class ImageCase:
    """A file, and either how it is read or the reason that it is rejected for.

    Attributes:
        data: the file.
        ending: of its name.
        size: height and width as read; None if it is rejected.
        first: the first color as read.
        corner: where the first color is: row and column, 0 or -1.
        notes: of the conversions.
        error: by how much each value may differ, for formats that lose something.
        reason: of the rejection.
    """

    data: bytes
    ending: str
    size: tuple[int, int] | None = None
    first: tuple[int, int, int] = (0, 0, 0)
    corner: tuple[int, int] = (0, 0)
    notes: frozenset[str] = frozenset()
    error: int = 0
    reason: str = ""


def draw(mode: str, size: tuple[int, int] = SIDE) -> PIL.Image.Image:
    """The image of two colors."""
    first, other, _, _ = MODES[mode]
    name, (height, width) = mode.split()[0], size
    if name == "I;16":
        values = np.full(size, other, np.uint16)
        values[:BLOCK, :BLOCK] = first
        return PIL.Image.fromarray(values)
    image = PIL.Image.new("RGB" if name == "P" else name, (width, height), other)
    image.paste(first, (0, 0, min(BLOCK, width), min(BLOCK, height)))
    return image.convert("P", palette=PIL.Image.Palette.ADAPTIVE) if name == "P" else image


def read(data: bytes, ending: str, mode: str, size: tuple[int, int] = SIDE, **changes) -> ImageCase:
    """A case that is read."""
    _, _, first, notes = MODES[mode]
    fields = dict(size=size, first=first, notes=frozenset(notes)) | changes
    return ImageCase(data, ending, **fields)


def rejected(data: bytes, ending: str, reason: str) -> ImageCase:
    """A case that is not."""
    return ImageCase(data, ending, reason=reason)


def _lossy(mode: str, size: tuple[int, int] = SIDE, kind: str = "JPEG", **options) -> bytes:
    more = dict(subsampling=0) if kind == "JPEG" else {}
    return encoded(draw(mode, size), kind, quality=95, **more, **options)


def sizes() -> Iterator[tuple[str, ImageCase]]:
    """Each format, mode and size."""
    for mode, size in itertools.product(PNG_MODES, SIZES):
        yield f"png {mode} {size}", read(encoded(draw(mode, size)), "png", mode, size)
    for mode, size in itertools.product(WEBP_MODES, SIZES):
        data = encoded(draw(mode, size), "WEBP", lossless=True, exact=True)
        yield f"webp {mode} {size}", read(data, "webp", mode, size)
    for mode, size, progressive in itertools.product(JPEG_MODES, SIZES, (False, True)):
        data = _lossy(mode, size, progressive=progressive)
        name = f"{'progressive ' if progressive else ''}jpg {mode} {size}"
        yield name, read(data, "jpg", mode, size, error=6)


def exif(kind: int, value: bytes, count: int = 1) -> bytes:
    """EXIF data whose one entry is the orientation."""
    return struct.pack("<2sHIHHHI4sI", b"II", 42, 8, 1, 0x0112, kind, count, value, 0)


def _with_exif(form: str, data: bytes) -> tuple[bytes, str, str, int]:
    """A file with EXIF data: (the file, its ending, its mode, how exact it is)."""
    kind, mode = form.split(" ", 1)
    if kind == "png":
        plain = encoded(draw(mode))
        return plain[:33] + chunk(b"eXIf", data) + plain[33:], kind, mode, 0
    if kind == "webp":
        options = dict(lossless=True, exact=True, exif=data)
        return encoded(draw(mode), "WEBP", **options), kind, mode, 0
    plain = _lossy(mode)
    segment = b"\xff\xe1" + struct.pack(">H", len(data) + 8) + b"Exif\0\0" + data
    return plain[:2] + segment + plain[2:], kind, mode, 6


FORMS = ["png RGB", "png LA", "jpg RGB", "jpg L", "webp RGB", "webp RGBA"]


def orientations() -> Iterator[tuple[str, ImageCase]]:
    """Each orientation in each format, little and big endian."""
    for form, (turn, corner) in itertools.product(FORMS, CORNERS.items()):
        data = exif(3, struct.pack("<HH", turn, 0))
        if turn % 2:
            data = struct.pack(">2sHIHHHIHHI", b"MM", 42, 8, 1, 0x0112, 3, 1, turn, 0, 0)
        file, ending, mode, error = _with_exif(form, data)
        size = SIDE[::-1] if turn > 4 else SIDE
        notes = frozenset(MODES[mode][3] | ({"rotated"} if turn > 1 else set()))
        case = read(file, ending, mode, size, corner=corner, notes=notes, error=error)
        yield f"{form} turned {turn}", case


_RATIONAL = struct.pack("<HHI4s", 0x011A, 5, 1, struct.pack("<I", 2**31))
# Tells no way that an image could lie.
NO_ORIENTATION = {
    "no tiff": b"no exif data at all",
    "nothing": b"",
    "a header alone": b"II*\0",
    "cut off": exif(3, b"\x06\0\0\0")[:14],
    "a table outside": b"II*\0" + struct.pack("<I", 2**31),
    "orientation 0": exif(3, bytes(4)),
    "orientation 9": exif(3, b"\x09\0\0\0"),
    "orientation 65535": exif(3, b"\xff\xff\0\0"),
    "a huge orientation": exif(4, b"\xff\xff\xff\xee"),
    "a text": exif(2, b"6\0\0\0"),
    "another tag": struct.pack("<2sHIH", b"II", 42, 8, 1) + _RATIONAL + bytes(4),
}


def metadata() -> Iterator[tuple[str, ImageCase]]:
    """EXIF data without an orientation, texts, comments and profiles change no pixel."""
    for form, (name, data) in itertools.product(
        ("png RGB", "jpg RGB", "webp RGB"), NO_ORIENTATION.items()
    ):
        file, ending, mode, error = _with_exif(form, data)
        yield f"{form} exif: {name}", read(file, ending, mode, error=error)
    plain = encoded(draw("RGB"))
    for kind, data, flipped in itertools.product(
        (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"tIME", b"pHYs", b"prVt"),
        (b"", b"a\0b", bytes(50), b"\xff" * 50, b"a\0\0" + zlib.compress(bytes(2 << 20))),
        (0, 1),
    ):
        file = plain[:33] + chunk(kind, data, flipped) + plain[33:]
        name = f"png {kind.decode()} of {len(data)} {'flipped ' * flipped}{data[:1].hex()}"
        yield name, read(file, "png", "RGB")
    for marker, size in itertools.product((*range(0xE3, 0xEE), 0xFE), (0, 3, 60_000)):
        file = _lossy("RGB")
        segment = bytes([0xFF, marker]) + struct.pack(">H", size + 2) + b"\xff" * size
        name = f"jpg marker {marker:x} of {size}"
        yield name, read(file[:2] + segment + file[2:], "jpg", "RGB", error=6)


def endings() -> Iterator[tuple[str, ImageCase]]:
    """An image under every ending, in any case; and what is no such image under all of them."""
    sound = {"png": encoded(draw("RGB")), "jpg": _lossy("RGB")}
    sound["webp"] = encoded(draw("RGB"), "WEBP", lossless=True)
    for (kind, data), ending in itertools.product(
        sound.items(), ("png", "jpg", "webp", "JPEG", "PNG")
    ):
        is_right = ending.lower().replace("jpeg", "jpg") == kind
        notes = frozenset() if is_right else frozenset({"wrong-ending"})
        yield f"{kind} as {ending}", read(data, ending, "RGB", notes=notes, error=6)
    image = draw("RGB")
    others = {
        kind: encoded(image, kind) for kind in ("GIF", "BMP", "TIFF", "PPM", "TGA", "PDF", "ICO")
    }
    others |= {"svg": b"<svg/>", "html": b"<!doctype html>", "zip": b"PK\3\4" + bytes(60)}
    others |= {"zeros": bytes(100), "avif": b"\0\0\0\x20ftypavif" + bytes(40), "one byte": b"\x89"}
    others |= {"gzip": b"\x1f\x8b\x08" + bytes(40), "bom": b"\xef\xbb\xbf" + sound["png"]}
    for (kind, data), ending in itertools.product(others.items(), ("png", "jpg", "webp")):
        yield f"{kind} as {ending}", rejected(data, ending, "not-a-picture")
    for ending in ("png", "jpg", "webp"):
        yield f"nothing as {ending}", rejected(b"", ending, "empty-file")


def cuts() -> Iterator[tuple[str, ImageCase]]:
    """Files that end within their pixels, or before them."""
    noise = PIL.Image.fromarray(hostile.pixels(3, 60, 50))
    whole = {"png": {"png RGB": encoded(noise), "png L": encoded(noise.convert("L"))}}
    whole["jpg"] = {
        "jpg": encoded(noise, "JPEG"),
        "progressive jpg": encoded(noise, "JPEG", progressive=True),
    }
    whole["webp"] = {
        "webp": encoded(noise, "WEBP"),
        "lossless webp": encoded(noise, "WEBP", lossless=True),
    }
    for ending, by_name in whole.items():
        for (name, data), part in itertools.product(by_name.items(), (0.02, 0.3, 0.6, 0.9)):
            length = max(12, int(part * len(data)))
            yield f"{name} cut at {part:.0%}", rejected(data[:length], ending, "truncated")


def flips() -> Iterator[tuple[str, ImageCase]]:
    """One flipped bit: in what a PNG needs, which has checksums, or in what tells the format."""
    noise = encoded(hostile.pixels(3, 60, 50))
    start = noise.index(b"IDAT") + 4
    for place in (*range(16, 29, 3), *range(start, len(noise) - 16, 900)):
        yield f"png flipped at {place}", rejected(_flip(noise, place), "png", "damaged")
    palette = encoded(draw("P"))
    for place in range(palette.index(b"PLTE") + 4, palette.index(b"PLTE") + 10, 2):
        yield f"palette flipped at {place}", rejected(_flip(palette, place), "png", "damaged")
    for place in range(8):
        yield (
            f"signature of png flipped at {place}",
            rejected(_flip(noise, place), "png", "not-a-picture"),
        )
    webp, jpeg = encoded(draw("RGB"), "WEBP"), _lossy("RGB")
    for place in (0, 1, 2, 3, 8, 9, 10, 11):
        yield f"webp flipped at {place}", rejected(_flip(webp, place), "webp", "not-a-picture")
    for place in range(2):
        yield f"jpg flipped at {place}", rejected(_flip(jpeg, place), "jpg", "not-a-picture")


def _flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def _jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(_lossy("RGB"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _webp_claiming(side: int) -> bytes:
    """A lossless WebP whose canvas is larger than its image."""
    data = bytearray(encoded(draw("RGBA"), "WEBP", lossless=True, exif=b"x"))
    place = data.index(b"VP8X") + 12
    data[place : place + 6] = 2 * (side - 1).to_bytes(3, "little")
    return bytes(data)


def claims() -> Iterator[tuple[str, ImageCase]]:
    """Headers of more pixels than are read, and images of a single one."""
    large = [
        (60_000, 60_000),
        (9_000, 9_000),
        (1, 65_537),
        (65_537, 1),
        (1, 2**31 - 1),
        (8_193, 8_192),
    ]
    for width, height in large:
        data = hostile.png_claiming(width, height)
        yield f"png of {width} x {height}", rejected(data, "png", "too-many-pixels")
    for width, height in ((65_500, 65_500), (9_000, 9_000), (8_193, 8_192)):
        data = _jpeg_claiming(width, height)
        yield f"jpg of {width} x {height}", rejected(data, "jpg", "too-many-pixels")
    yield "webp of 16383 x 16383", rejected(_webp_claiming(16_383), "webp", "too-many-pixels")
    for mode in PNG_MODES:
        data = encoded(draw(mode, (1, 1)))
        yield f"png {mode} of one pixel", rejected(data, "png", "one-pixel")
    for mode in JPEG_MODES:
        yield f"jpg {mode} of one pixel", rejected(_lossy(mode, (1, 1)), "jpg", "one-pixel")
    yield "webp of one pixel", rejected(encoded(draw("RGB", (1, 1)), "WEBP"), "webp", "one-pixel")


GROUPS = (sizes, orientations, metadata, endings, cuts, flips, claims)


def cases() -> dict[str, ImageCase]:
    """All cases by name."""
    pairs = [pair for group in GROUPS for pair in group()]
    named = dict(pairs)
    assert len(named) == len(pairs), "two cases have one name"
    return named
