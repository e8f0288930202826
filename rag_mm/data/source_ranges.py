"""Splits a source of documents into ranges, which workers read independently of each other."""

import dataclasses
import itertools
from collections.abc import Iterator

from rag_mm.core.errors import UserError
from rag_mm.data import webdataset
from rag_mm.memory.writing import stream


@dataclasses.dataclass(frozen=True)
class Range:
    """The records after position `start` up to and including `stop`; they are written to file `number`."""

    number: int
    start: int
    stop: int


def split(source: stream.RecordStream, records_per_file: int) -> list[Range]:
    """Splits the whole source into ranges; a tar is always one.

    Raises:
        UserError: the number of the source's records is unknown.
    """
    if isinstance(source, webdataset.TarSource):
        boundaries = source.starts
    elif source.size is not None:
        boundaries = [*range(0, source.size, records_per_file), source.size]
    else:
        raise UserError("The number of the source's records is unknown, so it cannot be split.")
    pairs = enumerate(itertools.pairwise(boundaries))
    return [Range(number, start, stop) for number, (start, stop) in pairs]


def read(source: stream.RecordStream, part: Range) -> Iterator[stream.Item]:
    """The items of a range."""
    for item in source.read(part.start):
        if item.position > part.stop:
            return
        yield item
        if item.position == part.stop:
            return  # The next record need not be decoded.
