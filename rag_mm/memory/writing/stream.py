"""Documents as they come in: numbered, one at a time, each good or bad with a reason."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from rag_mm.core import document_types, files

_SAMPLED = 8


@dataclasses.dataclass(frozen=True)
class Reject:
    """A record that is left out.

    Attributes:
        name: of the record: its file, its key, or its line.
        reason: a code, such as `truncated`.
        detail: what exactly is wrong with it, in words.
    """

    name: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One record of a source.

    Attributes:
        position: where to go on reading after it.
        document: what it holds, or None where it is bad.
        reject: what is wrong with it, or None.
        notes: codes of what was done to read it, such as `grey` or `rotated`.
    """

    position: int
    document: document_types.Document | None = None
    reject: Reject | None = None
    notes: tuple[str, ...] = ()


@runtime_checkable
class RecordStream(Protocol):
    """Records in an order that does not change, read from any position on.

    Attributes:
        size: how many records there are, or None where only reading tells.
        fingerprint: changes where the records do, so that a build is not resumed on others.
    """

    size: int | None
    fingerprint: str

    def read(self, start: int) -> Iterator[Item]:
        """Items from `start` on: 0, or the position of an item of an earlier reading."""
        ...


class Documents(Protocol):
    """Documents in an order, each of which can be read at any time."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> document_types.Document: ...


class DocumentSource:
    """Documents as a source without bad records."""

    def __init__(self, documents: Documents):
        """The fingerprint is that of their number and of eight of them, ends included."""
        self._documents = documents
        self.size: int | None = len(documents)
        last = len(documents) - 1
        places = sorted({round(i * last / (_SAMPLED - 1)) for i in range(_SAMPLED)} - {-1})
        sampled = [_describe(documents[i]) for i in places]
        self.fingerprint = files.digest(
            files.canonical_json([len(documents), sampled]).encode("utf-8", "surrogatepass")
        )

    def read(self, start: int) -> Iterator[Item]:
        """All documents from number `start` on."""
        for i in range(start, len(self._documents)):
            yield Item(i + 1, self._documents[i])


def as_source(documents: Documents | RecordStream) -> RecordStream:
    """A source as it is, documents as one."""
    return documents if isinstance(documents, RecordStream) else DocumentSource(documents)


def count_reasons(rejects: Iterable[Reject]) -> dict[str, int]:
    """How many records each reason left out, most frequent first."""
    return dict(collections.Counter(reject.reason for reject in rejects).most_common())


def _describe(document: document_types.Document) -> Mapping[str, str | None]:
    image = document.image
    return {
        "id": document.id,
        "text": document.text,
        "image": None if image is None else files.digest(image.tobytes()),
    }
