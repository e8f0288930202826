"""Decodes untrusted image files: which formats are read, how they are converted, and what is rejected."""

import dataclasses
import io
import re

import numpy as np
import PIL.Image

from rag_mm.core import image_files
from rag_mm.core.errors import UserError
from rag_mm.data import image_metadata

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 1 << 28
"""Larger files are not read (256 MiB)."""

MAX_SIDE = 1 << 16
"""Images with a longer side are not decoded, since some steps need memory for squares of it (65,536)."""
MAX_SCANS = 100
"""JPEGs with more scans are not decoded; usual progressive ones have ten."""
# Between segments; within a scan's data 0xFF is followed by 0 or by the number of a restart.
_MARKER = re.compile(rb"\xff+[^\x00\xff]")
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_BARE_MARKERS = (0x01, *range(0xD0, 0xD9))

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
    "too-many-pixels": f"more than {image_files.MAX_PIXELS:,}, or a side of more than {MAX_SIDE:,}",
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
    data: bytes,
    ending: str = "",
    min_pixels: int = 1,
    composite_on_white: bool = True,
    max_pixels: int = image_files.MAX_PIXELS,
) -> DecodedImage:
    """Decodes a JPEG, PNG or WebP image; its header is checked before anything is decoded.

    Metadata that cannot be read is left out; pixels that cannot be read are an error.

    Args:
        data: the file's bytes.
        ending: the file name's ending without the dot, to note a wrong one; empty to skip the check.
        min_pixels: images with fewer pixels are rejected.
        composite_on_white: blends transparent pixels with white; else alpha is dropped and the stored
            colors are kept.
        max_pixels: images with more pixels are rejected.

    Raises:
        BadImage: with one of `REJECT_REASONS`.
    """
    if not data:
        raise BadImage("empty-file", "is not a JPEG, PNG or WebP image: it is empty.")
    if len(data) > MAX_BYTES:
        raise BadImage("too-many-bytes", f"has more than {MAX_BYTES:,} bytes; scale it down.")
    options = (ending, min_pixels, composite_on_white, max_pixels)
    try:
        try:
            return _decode(data, *options)
        except Exception:
            bare = image_metadata.without_unused(data)
            if len(bare) == len(data):
                raise
            return _decode(bare, *options)
    except BadImage:
        raise
    except Exception as error:  # Damaged bytes can make the decoder raise almost any exception.
        raise _classify(data, error) from error


def _decode(
    data: bytes, ending: str, min_pixels: int, composite_on_white: bool, max_pixels: int
) -> DecodedImage:
    too_large = BadImage("too-many-pixels", f"has more than {max_pixels:,} pixels; scale it down.")
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise too_large
            if max(image.size) > MAX_SIDE:
                raise BadImage(
                    "too-many-pixels",
                    f"has a side of more than {MAX_SIDE:,} pixels; scale it down.",
                )
            if image.format in ("JPEG", "MPO") and _num_scans(data) > MAX_SCANS:
                raise BadImage(
                    "damaged", f"is drawn more than {MAX_SCANS} times over; save it again."
                )
            if image.width * image.height < min_pixels:
                raise BadImage("one-pixel", "has only one pixel.")
            image.load()
            notes = _notes(image, data, ending)
            hole = image.info.get("transparency")
            if "16-bit" in notes and isinstance(hole, tuple):
                image.info["transparency"] = tuple(value >> 8 for value in hole)
            return DecodedImage(
                image_files.to_rgb(image_files.upright(image), composite_on_white), notes
            )
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise too_large from None


def _num_scans(data: bytes) -> int:
    """How often a JPEG draws over its pixels; each scan of a few bytes takes the time of all pixels."""
    count, position = 0, 2
    while (match := _MARKER.search(data, position)) is not None:
        position = match.end()
        marker = data[position - 1]
        if marker == _END_OF_IMAGE or count > MAX_SCANS:
            break
        if marker not in _BARE_MARKERS:  # A segment with its length, which may hold anything.
            count += marker == _START_OF_SCAN
            position += int.from_bytes(data[position : position + 2], "big")
    return count


def _classify(data: bytes, error: Exception) -> BadImage:
    """The rejection for a file that could not be decoded."""
    file_format = next((name for name, start in _MAGIC.items() if data.startswith(start[:4])), None)
    if file_format is not None and _is_truncated(data, file_format):
        return BadImage("truncated", f"is damaged: it ends too early ({error}).")
    is_webp = file_format == "WEBP" and data[8:12] == b"WEBP"
    is_known = is_webp or data.startswith((_MAGIC["JPEG"], _MAGIC["PNG"]))
    if isinstance(error, PIL.UnidentifiedImageError) and not is_known:
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
    # Phones add further pictures, such as a map of depths, to a JPEG, which is then called an MPO.
    is_mpo = image.format == "MPO"
    file_format = "JPEG" if is_mpo else image.format
    conditions = {
        modes.get(image.mode): True,
        "alpha": image.has_transparency_data,
        "16-bit": is_16_bit,
        "animated": not is_mpo and getattr(image, "is_animated", False),
        "rotated": image_files.orientation(image) != 1,
        "wrong-ending": ending != "" and _ENDINGS.get(ending.lower()) != file_format,
    }
    return tuple(sorted(note for note, holds in conditions.items() if note is not None and holds))
