"""Decodes untrusted image files: which formats are read, how they are converted, and what is rejected."""

import dataclasses
import io

import numpy as np
import PIL.Image
import PIL.ImageOps

from rag_mm.core import image_files
from rag_mm.core.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 1 << 28
"""Larger files are not read (256 MiB)."""

NOTES = {
    "cmyk": "CMYK is converted to RGB",
    "alpha": "transparent pixels are blended with white",
    "16-bit": "the high byte of each value is kept",
    "1-bit": "black and white is converted to RGB",
    "palette": "indexed colors are converted to RGB",
    "grey": "grayscale is converted to RGB",
    "animated": "only the first frame is read",
    "rotated": "rotated as its EXIF data says",
    "wrong-ending": "read by its content, which the file name's ending contradicts",
}
"""Codes of the conversions that are applied, with descriptions."""

REJECT_REASONS = {
    "empty-file": "an empty file",
    "not-a-picture": "neither JPEG, PNG nor WebP",
    "truncated": "the file ends before the image is complete",
    "damaged": "the image cannot be decoded",
    "too-many-pixels": f"more than {image_files.MAX_PIXELS:,}; the header is checked before decoding",
    "too-many-bytes": f"more than {MAX_BYTES:,}",
    "one-pixel": "an image of a single pixel",
}
"""Codes of the reasons for which an image is rejected, with descriptions."""

_ENDINGS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
_MAGIC = {"JPEG": b"\xff\xd8\xff", "PNG": b"\x89PNG\r\n\x1a\n", "WEBP": b"RIFF"}


class BadImage(UserError):
    """A rejected image: `reason` is a reason code; the message lacks the subject of its sentence."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedImage:
    """Pixels, uint8 [H, W, 3], and the codes (`NOTES`) of the conversions applied."""

    pixels: np.ndarray
    notes: tuple[str, ...]


def decode(
    data: bytes, ending: str = "", min_pixels: int = 1, composite_on_white: bool = True
) -> DecodedImage:
    """Decodes a JPEG, PNG or WebP image; its header is checked before anything is decoded.

    Args:
        data: the file's bytes.
        ending: the file name's ending without the dot, to note a wrong one; empty to skip the check.
        min_pixels: images with fewer pixels are rejected.
        composite_on_white: blends transparent pixels with white; else alpha is dropped and the stored
            colors are kept.

    Raises:
        BadImage: with one of `REJECT_REASONS`.
    """
    if not data:
        raise BadImage("empty-file", "is not a JPEG, PNG or WebP image: it is empty.")
    if len(data) > MAX_BYTES:
        raise BadImage("too-many-bytes", f"has more than {MAX_BYTES:,} bytes; scale it down.")
    too_large = BadImage(
        "too-many-pixels", f"has more than {image_files.MAX_PIXELS:,} pixels; scale it down."
    )
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > image_files.MAX_PIXELS:
                raise too_large
            if image.width * image.height < min_pixels:
                raise BadImage("one-pixel", "has only one pixel.")
            notes = _notes(image, data, ending)
            image.load()
            return DecodedImage(
                image_files.to_rgb(PIL.ImageOps.exif_transpose(image), composite_on_white), notes
            )
    except BadImage:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise too_large from None
    except Exception as error:  # Damaged bytes can make the decoder raise almost any exception.
        raise _classify(data, error) from error


def _classify(data: bytes, error: Exception) -> BadImage:
    """The rejection for a file that could not be decoded."""
    file_format = next((name for name, start in _MAGIC.items() if data.startswith(start[:4])), None)
    if file_format is not None and _is_truncated(data, file_format):
        return BadImage("truncated", f"is damaged: it ends too early ({error}).")
    if isinstance(error, PIL.UnidentifiedImageError):
        return BadImage("not-a-picture", "is not a JPEG, PNG or WebP image.")
    return BadImage("damaged", f"is damaged ({error}).")


def _is_truncated(data: bytes, file_format: str) -> bool:
    if file_format == "JPEG":
        return b"\xff\xd9" not in data[-64:]
    if file_format == "PNG":
        return b"IEND" not in data[-64:]
    return len(data) < 12 or 8 + int.from_bytes(data[4:8], "little") > len(data)


def _notes(image: PIL.Image.Image, data: bytes, ending: str) -> tuple[str, ...]:
    modes = {"CMYK": "cmyk", "1": "1-bit", "P": "palette", "L": "grey", "LA": "grey"}
    is_16_bit = image.mode.startswith("I") or (image.format == "PNG" and data[24:25] == b"\x10")
    conditions = {
        modes.get(image.mode): True,
        "alpha": image.has_transparency_data,
        "16-bit": is_16_bit,
        "animated": getattr(image, "is_animated", False),
        "rotated": image.getexif().get(0x0112, 1) not in (0, 1),
        "wrong-ending": ending != "" and _ENDINGS.get(ending.lower()) != image.format,
    }
    return tuple(sorted(note for note, holds in conditions.items() if note is not None and holds))
