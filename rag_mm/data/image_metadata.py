"""Leaves out of an image file the metadata that would keep its pixels from being decoded."""

import struct
import zlib
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
# What is read beside the pixels: transparency, the orientation, and that there are several frames.
_USED = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")


def without_unused(data: bytes) -> bytes:
    """The file without metadata that decoding needs not: of a PNG, all that is not used, and what is damaged.

    Pillow refuses texts and color profiles of more than a megabyte, and resolutions of a wrong length.
    Damaged is a chunk with a wrong checksum; one that decoding cannot do without is kept, as is all that
    follows the last whole chunk. Other files are returned unchanged.
    """
    if not data.startswith(_PNG):
        return data
    return _PNG + b"".join(
        data[start:end] for start, end in _chunks(data) if _is_needed(data[start:end])
    )


def _chunks(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each chunk: length, type, content, checksum."""
    start = len(_PNG)
    while start < len(data):
        length = int.from_bytes(data[start : start + 4], "big")
        end = min(start + 12 + length, len(data))
        yield start, end
        start = end


def _is_needed(chunk: bytes) -> bool:
    kind = chunk[4:8]
    is_critical = kind[:1].isupper()
    if is_critical or len(chunk) < 12:
        return True
    is_whole = struct.unpack(">I", chunk[-4:])[0] == zlib.crc32(chunk[4:-4])
    return kind in _USED and is_whole
