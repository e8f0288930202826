"""The stored form of a corpus's documents: text ids and image codes in the smallest integers, in msgpack."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.data.flat_documents import FlatDocuments
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

    def read_flat(self, records: Sequence[bytes]) -> FlatDocuments:
        """Parses the bytes of many documents at once, without their provenance.

        Raises:
            UserError: one is not a record of this format.
        """
        try:
            fields = [msgpack.unpackb(data)[3] for data in records]
            kinds = np.array([kind for each in fields for kind in each[::2]], np.int8)
            values = [value for each in fields for value in each[1::2]]
            sizes = np.array([len(value) for value in values], np.int64)
            if len(kinds) != len(values) or not np.isin(kinds, range(len(_KINDS))).all():
                raise ValueError("a segment is neither a text nor an image")
            is_image = kinds == _KINDS.index(IMAGE)
            starts, lengths = np.zeros_like(sizes), np.zeros_like(sizes)
            ids: list[np.ndarray] = []
            for kind, dtype in enumerate(self.dtypes):
                of_kind = kinds == kind
                if (sizes[of_kind] % dtype.itemsize).any():
                    raise ValueError("its ids are cut")
                joined = b"".join(itertools.compress(values, of_kind.tolist()))
                lengths[of_kind] = sizes[of_kind] // dtype.itemsize
                ends = np.cumsum(lengths[of_kind])
                starts[of_kind] = ends - lengths[of_kind] + sum(len(each) for each in ids)
                ids.append(np.frombuffer(joined, dtype).astype(np.int32))
        except Exception as error:  # msgpack raises many types on damaged bytes.
            raise UserError(f"A record is damaged ({error}).") from error
        firsts = np.cumsum([0, *(len(each) // 2 for each in fields)])
        return FlatDocuments(np.concatenate(ids), starts, lengths, is_image, firsts)

    def _segments(self, fields: Sequence[Any]) -> list[TokenSegment]:
        dtypes = self.dtypes
        return [
            TokenSegment(_KINDS[kind], np.frombuffer(values, dtypes[kind]))
            for kind, values in zip(fields[::2], fields[1::2], strict=True)
        ]


def segment_rows(row: int, example: Example) -> list[tuple[int, int, int]]:
    """(row, kind, length) of each segment; a kind is 0 for a text and 1 for an image."""
    return [(row, _KINDS.index(s.kind), len(s.ids)) for s in example.segments]
