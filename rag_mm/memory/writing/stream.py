"""Sources of documents: numbered items, each a document or a reject with a reason."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

from rag_mm.core import document_types, files

_SAMPLED = 8


@dataclasses.dataclass(frozen=True)
class Reject:
    """A bad record, which is skipped.

    Attributes:
        name: identifies the record: its file, key or line.
        reason: a reason code, such as `truncated`.
        detail: a description of the problem.
    """

    name: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True, eq=False)
class Item:
    """One record of a source.

    Attributes:
        position: the position from which reading resumes after this item.
        document: the document, or None if the record is bad.
        reject: the problem, or None if the record is good.
        notes: codes of the conversions applied, such as `grey` or `rotated`.
    """

    position: int
    document: document_types.Document | None = None
    reject: Reject | None = None
    notes: tuple[str, ...] = ()


@runtime_checkable
class RecordStream(Protocol):
    """Records in a fixed order that can be read from any position.

    Attributes:
        size: number of records, or None if it is only known after reading them.
        fingerprint: changes when the records change, so that a build is not resumed with other records.
    """

    size: int | None
    fingerprint: str

    def read(self, start: int) -> Iterator[Item]:
        """Items from `start` on, which is 0 or the `position` of an item read earlier."""
        ...


class Documents(Protocol):
    """An ordered collection of documents with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> document_types.Document: ...


class DocumentSource:
    """A source made of documents; it has no bad records."""

    def __init__(self, documents: Documents):
        """The fingerprint covers the number of documents and eight of them, including first and last."""
        self._documents = documents
        self.size: int | None = len(documents)
        last = len(documents) - 1
        indices = sorted({round(i * last / (_SAMPLED - 1)) for i in range(_SAMPLED)} - {-1})
        sampled = [_describe(documents[i]) for i in indices]
        self.fingerprint = files.digest(
            files.canonical_json([len(documents), sampled]).encode("utf-8", "surrogatepass")
        )

    def read(self, start: int) -> Iterator[Item]:
        """All documents from index `start` on."""
        for i in range(start, len(self._documents)):
            yield Item(i + 1, self._documents[i])


def as_source(documents: Documents | RecordStream) -> RecordStream:
    """Returns a source unchanged and wraps documents into one."""
    return documents if isinstance(documents, RecordStream) else DocumentSource(documents)


def count_reasons(rejects: Iterable[Reject]) -> dict[str, int]:
    """Number of rejects by reason, most frequent first."""
    return dict(collections.Counter(reject.reason for reject in rejects).most_common())


def _describe(document: document_types.Document) -> Mapping[str, str | list[str]]:
    return {
        "id": document.id,
        "text": document.text,
        "pictures": [files.digest(picture.tobytes()) for picture in document.pictures],
    }
