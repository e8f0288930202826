"""The stored form of a corpus's documents: text ids and image codes in the smallest integers, in msgpack."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.data.token_documents import IMAGE, TEXT, Example, TokenSegment

_KINDS = (TEXT, IMAGE)  # A kind is stored as its place here.


@dataclasses.dataclass(frozen=True, eq=False)
class TokenDocument:
    """A document as tokens, with its provenance.

    Attributes:
        id: unique in the corpus.
        url, license: as given by its source.
        example: its texts and images in order; a video is one image per frame.
    """

    id: str
    url: str | None
    license: str | None
    example: Example


@dataclasses.dataclass(frozen=True)
class TokenFormat:
    """The integers in which records keep ids.

    Attributes:
        text_size: number of text ids.
        codebook_size: number of codes.
    """

    text_size: int
    codebook_size: int

    @property
    def dtypes(self) -> tuple[np.dtype, np.dtype]:
        """The smallest unsigned little-endian integers of text ids and of codes."""
        text, codes = (
            np.min_scalar_type(size - 1).newbyteorder("<")
            for size in (self.text_size, self.codebook_size)
        )
        return text, codes

    def to_bytes(self, document: TokenDocument) -> bytes:
        """Serializes a document; equal documents give equal bytes.

        Raises:
            ValueError: an id is out of range.
        """
        segments = []
        for segment in document.example.segments:
            kind, values = _KINDS.index(segment.kind), np.asarray(segment.ids, np.int64)
            size = (self.text_size, self.codebook_size)[kind]
            if len(values) and not 0 <= values.min() <= values.max() < size:
                raise ValueError(f"{segment.kind} ids of {document.id!r} are not in [0, {size})")
            segments += [kind, values.astype(self.dtypes[kind]).tobytes()]
        return msgpack.packb([document.id, document.url, document.license, segments])

    def from_bytes(self, data: bytes) -> TokenDocument:
        """Parses the bytes of `to_bytes`.

        Raises:
            UserError: the bytes are not a record of this format.
        """
        try:
            name, url, license, fields = msgpack.unpackb(data, raw=False)
            return TokenDocument(name, url, license, Example(tuple(self._segments(fields))))
        except Exception as error:  # msgpack raises many types on damaged bytes.
            raise UserError(f"A record is damaged ({error}).") from error

    def _segments(self, fields: Sequence[Any]) -> list[TokenSegment]:
        dtypes = self.dtypes
        return [
            TokenSegment(_KINDS[kind], np.frombuffer(values, dtypes[kind]))
            for kind, values in zip(fields[::2], fields[1::2], strict=True)
        ]


def segment_rows(row: int, example: Example) -> list[tuple[int, int, int]]:
    """(row, kind, length) of each segment; a kind is 0 for a text and 1 for an image."""
    return [(row, _KINDS.index(s.kind), len(s.ids)) for s in example.segments]
