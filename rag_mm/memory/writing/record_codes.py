"""Fills records with an image tokenizer's codes of their pictures."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from rag_mm.core import document_types, image_files
from rag_mm.memory import model_protocols
from rag_mm.memory.store import record


def fill_all(
    records: Iterable[record.Record], tokenizer: model_protocols.ImageTokenizer, at_once: int
) -> Iterator[record.Record]:
    """Any number of records, filled as by `fill`, in batches with about `at_once` pictures."""
    batch: list[record.Record] = []
    num_pictures = 0
    for entry in records:
        batch.append(entry)
        num_pictures += len(entry.document.pictures)
        if num_pictures >= at_once:
            yield from fill(batch, tokenizer, at_once)
            batch, num_pictures = [], 0
    yield from fill(batch, tokenizer, at_once)


def fill(
    records: Sequence[record.Record], tokenizer: model_protocols.ImageTokenizer, at_once: int
) -> list[record.Record]:
    """The records with the tokenizer's codes of every picture; pictures that have some keep them.

    Args:
        records: their pictures are scaled to the tokenizer's image size.
        tokenizer: the image tokenizer.
        at_once: number of pictures handed to it together.
    """
    name = tokenizer.fingerprint
    codes = [dict(entry.codes.get(name, {})) for entry in records]
    missing = [
        (row, i)
        for row, entry in enumerate(records)
        for i in record.picture_segments(entry.document)
        if i not in codes[row]
    ]
    segments: list[Any] = [records[row].document.segments[i] for row, i in missing]
    for (row, i), values in zip(missing, _encode(segments, tokenizer, at_once), strict=True):
        codes[row][i] = values
    return [
        dataclasses.replace(entry, codes={**entry.codes, name: each}) if each else entry
        for entry, each in zip(records, codes, strict=True)
    ]


def _encode(
    segments: Sequence[document_types.Image | document_types.Video],
    tokenizer: model_protocols.ImageTokenizer,
    at_once: int,
) -> Iterator[np.ndarray]:
    """Codes of images, int32 [N], and of videos, int32 [F, N]."""
    pictures = (
        image_files.fit(picture, tokenizer.image_size) for s in segments for picture in s.pictures
    )
    encoded: list[np.ndarray] = []
    while batch := list(itertools.islice(pictures, at_once)):
        encoded += list(np.asarray(tokenizer.encode(np.stack(batch)), np.int32))
    left = iter(encoded)
    for segment in segments:
        codes = np.stack([next(left) for _ in segment.pictures])
        yield codes if isinstance(segment, document_types.Video) else codes[0]
