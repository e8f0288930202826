"""Pictures that strangers made: what kinds are read, what becomes of each, and what is refused."""

import dataclasses
import io

import numpy as np
import PIL.Image
import PIL.ImageOps

from rag_mm.core import image_files
from rag_mm.core.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 1 << 28
"""No file of more bytes is read (256 MiB)."""

NOTES = {
    "cmyk": "four inks become RGB",
    "alpha": "transparent parts become white",
    "16-bit": "the high byte of each value is kept",
    "1-bit": "black and white become RGB",
    "palette": "indexed colours become RGB",
    "grey": "brightness becomes RGB",
    "animated": "the first frame is taken",
    "rotated": "turned as its EXIF data says",
    "wrong-ending": "the content decides, not the ending of its name",
}
"""Kinds that are read, and what becomes of them."""

REFUSALS = {
    "empty-file": "a file of no bytes",
    "not-a-picture": "neither JPEG, PNG nor WebP",
    "truncated": "the file ends before the picture does",
    "damaged": "the decoder stumbles",
    "too-many-pixels": f"more than {image_files.MAX_PIXELS:,}, which the header tells before decoding",
    "too-many-bytes": f"more than {MAX_BYTES:,}",
    "one-pixel": "a picture of one pixel shows nothing",
}
"""Kinds that are not."""

_ENDINGS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
_MAGIC = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n", "WEBP": b"RIFF"}


class BadPicture(UserError):
    """A picture that is refused: `reason` is a code, the message lacks the subject of its sentence."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """uint8 [H, W, 3] and the codes (`NOTES`) of what was done to get there."""

    pixels: np.ndarray
    notes: tuple[str, ...]


def decode(data: bytes, ending: str = "", min_pixels: int = 1, is_whitened: bool = True) -> Picture:
    """Reads a JPEG, PNG or WebP file's content; nothing is decoded before its header was checked.

    Args:
        data: the file's bytes.
        ending: of its name, without the dot, to note one that is wrong; empty for none.
        min_pixels: a picture of fewer is refused.
        is_whitened: transparent parts become white; else they show whatever colour lies below.

    Raises:
        BadPicture: with one of `REFUSALS`.
    """
    if not data:
        raise BadPicture("empty-file", "is not a JPEG, PNG or WebP picture: it is empty.")
    if len(data) > MAX_BYTES:
        raise BadPicture("too-many-bytes", f"has more than {MAX_BYTES:,} bytes; scale it down.")
    too_large = BadPicture(
        "too-many-pixels", f"has more than {image_files.MAX_PIXELS:,} pixels; scale it down."
    )
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > image_files.MAX_PIXELS:
                raise too_large
            if image.width * image.height < min_pixels:
                raise BadPicture("one-pixel", "is of one pixel, which shows nothing.")
            notes = _kind(image, data, ending)
            image.load()
            return Picture(_to_rgb(PIL.ImageOps.exif_transpose(image), is_whitened), notes)
    except BadPicture:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise too_large from None
    except Exception as error:  # Damaged bytes raise whatever the decoder stumbled over.
        raise _explain(data, error) from error


def _explain(data: bytes, error: Exception) -> BadPicture:
    kind = next((kind for kind, start in _MAGIC.items() if data.startswith(start[:4])), None)
    if kind is not None and _is_cut_short(data, kind):
        return BadPicture("truncated", f"is damaged: it ends too early ({error}).")
    if isinstance(error, PIL.UnidentifiedImageError):
        return BadPicture("not-a-picture", "is not a JPEG, PNG or WebP picture.")
    return BadPicture("damaged", f"is damaged ({error}).")


def _is_cut_short(data: bytes, kind: str) -> bool:
    if kind == "JPEG":
        return b"\xff\xd9" not in data[-64:]
    if kind == "PNG":
        return b"IEND" not in data[-64:]
    return len(data) < 12 or 8 + int.from_bytes(data[4:8], "little") > len(data)


def _kind(image: PIL.Image.Image, data: bytes, ending: str) -> tuple[str, ...]:
    modes = {"CMYK": "cmyk", "1": "1-bit", "P": "palette", "L": "grey", "LA": "grey"}
    is_deep = image.mode.startswith("I") or (image.format == "PNG" and data[24:25] == b"\x10")
    found = {
        modes.get(image.mode): True,
        "alpha": image.has_transparency_data,
        "16-bit": is_deep,
        "animated": getattr(image, "is_animated", False),
        "rotated": image.getexif().get(0x0112, 1) not in (0, 1),
        "wrong-ending": ending != "" and _ENDINGS.get(ending.lower()) != image.format,
    }
    return tuple(sorted(note for note, holds in found.items() if note is not None and holds))


def _to_rgb(image: PIL.Image.Image, is_whitened: bool) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip at 255 instead of scaling.
        gray = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if is_whitened and image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))
