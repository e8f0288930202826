"""Documents as tokens: what training sequences and prompts are built from."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rag_mm.core.document_types import Document, Text
from rag_mm.data.vocabulary import Vocabulary

TEXT, IMAGE = "text", "image"
Ids = Sequence[int] | np.ndarray  # int [N]


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSegment:
    """A text or an image of a document.

    Attributes:
        kind: `TEXT` or `IMAGE`.
        ids: text ids, or codes in the codebook, of all grids of the image from coarse to fine.
        image_size: height and width of an image in pixels, for vocabularies with several image sizes.
        role: how its tokens count as targets (`core.roles`); None for main in the main document and retrieved
            in a retrieved one. An ignored segment is attended to and never a target, nor masked.
        is_maskable: whether masking may move spans of it.
    """

    kind: str
    ids: Ids
    image_size: int | None = None
    role: int | None = None
    is_maskable: bool = True


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One document as tokens.

    Attributes:
        segments: texts and images, in order.
        num_cut: number of text tokens that were cut off.
    """

    segments: tuple[TokenSegment, ...]
    num_cut: int = 0

    def find(self, kind: str) -> int:
        """The number of the first segment of a kind; ValueError if there is none."""
        return [segment.kind for segment in self.segments].index(kind)

    @property
    def text(self) -> Ids:
        """Ids of the first text; empty if there is none."""
        return next((s.ids for s in self.segments if s.kind == TEXT), ())

    @property
    def codes(self) -> np.ndarray:
        """Codes of the first image, int32 [N]; ValueError if there is none."""
        return np.asarray(self.segments[self.find(IMAGE)].ids)

    def with_text(self, ids: Ids) -> "Example":
        """The document with other ids in its first text; ValueError if there is none."""
        return self.replace(self.find(TEXT), ids=ids)

    def with_codes(self, codes: np.ndarray, image_size: int | None = None) -> "Example":
        """The document with other codes, int32 [N], in its first image; ValueError if there is none."""
        at = self.find(IMAGE)
        return self.replace(at, ids=codes, image_size=image_size or self.segments[at].image_size)

    def replace(self, at: int, **changes: Any) -> "Example":
        """The document with other attributes of segment `at`."""
        segments = list(self.segments)
        segments[at] = dataclasses.replace(segments[at], **changes)
        return dataclasses.replace(self, segments=tuple(segments))

    def cut(self, max_text_len: int) -> "Example":
        """The document with its texts cut to `max_text_len` ids."""
        if all(s.kind == IMAGE or len(s.ids) <= max_text_len for s in self.segments):
            return self
        cut = [max(0, len(s.ids) - max_text_len) * (s.kind == TEXT) for s in self.segments]
        segments = (
            dataclasses.replace(s, ids=s.ids[: len(s.ids) - n])
            for s, n in zip(self.segments, cut, strict=True)
        )
        return dataclasses.replace(self, segments=tuple(segments), num_cut=self.num_cut + sum(cut))

    def images_first(self) -> "Example":
        """The document with its images before its texts."""
        ordered = sorted(self.segments, key=lambda segment: segment.kind != IMAGE)
        return dataclasses.replace(self, segments=tuple(ordered))


def pair(
    text: Ids,
    codes: np.ndarray,
    image_size: int | None = None,
    num_cut: int = 0,
) -> Example:
    """A caption and its image: text ids, and codes int32 [N]."""
    image = TokenSegment(IMAGE, np.asarray(codes, np.int32), image_size)
    return Example((TokenSegment(TEXT, text), image), num_cut)


def encode_text(vocabulary: Vocabulary, text: str, max_len: int) -> tuple[list[int], int]:
    """The first `max_len` ids of `text`, and the number of ids cut off."""
    ids = vocabulary.encode_text(text)
    return ids[:max_len], max(0, len(ids) - max_len)


def from_document(
    vocabulary: Vocabulary,
    document: Document,
    codes: Sequence[np.ndarray],
    max_text_len: int,
    image_size: int | None = None,
) -> Example:
    """The tokens of a document of any segments; a video is one image per frame.

    Args:
        vocabulary: the ids.
        document: the document.
        codes: int32 [N] of every picture: images and frames of videos, in order.
        max_text_len: texts are cut to this many tokens.
        image_size: height and width in pixels that all pictures were scaled to.
    """
    segments, num_cut, left = [], 0, iter(codes)
    for segment in document.segments:
        if isinstance(segment, Text):
            ids, cut = encode_text(vocabulary, segment.text, max_text_len)
            segments.append(TokenSegment(TEXT, ids))
            num_cut += cut
        else:
            segments += [
                TokenSegment(IMAGE, np.asarray(next(left), np.int32), image_size)
                for _ in segment.pictures
            ]
    if next(left, None) is not None:
        raise ValueError(f"document {document.id!r} has fewer pictures than codes were given")
    return Example(tuple(segments), num_cut)
