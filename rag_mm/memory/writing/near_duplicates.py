"""Keeps documents out that should not stand in a memory: what evaluation asks for, and repeats."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from rag_mm.core import document_types, files
from rag_mm.memory import model_protocols
from rag_mm.memory.store import shard_file
from rag_mm.memory.writing import stream


@dataclasses.dataclass(frozen=True, eq=False)
class ExclusionSet:
    """Documents that, like whatever is nearly the same, stay out of a memory.

    A document is kept out for an id of theirs, for a picture whose embedding has a cosine of at least
    `similarity` with one of theirs, or, without a picture, for a text of theirs (without regard to
    case, punctuation and spacing).

    Attributes:
        ids: of the documents.
        captions: hashes of the texts of those without a picture.
        pictures: float32 [E, D] unit rows.
        similarity: the bound.
    """

    ids: frozenset[str]
    captions: frozenset[str]
    pictures: np.ndarray
    similarity: float

    @classmethod
    def of(
        cls,
        documents: stream.Documents | stream.RecordStream,
        encoder: model_protocols.Encoder,
        similarity: float = 0.98,
        batch_size: int = 256,
    ) -> "ExclusionSet":
        """Embeds the documents; bad records among them are passed over."""
        ids, captions, pictures = [], [], [np.zeros((0, encoder.dim), np.float32)]
        for batch in _batches(stream.as_source(documents).read(0), batch_size):
            ids += [document.id for document in batch]
            shown = [d for d in batch if d.image is not None]
            words = [d for d in batch if d.image is None]
            captions += [shard_file.caption_hash(d.text) for d in words]
            if shown:
                pictures.append(model_protocols.embed(shown, encoder, batch_size)["image"])
        return cls(frozenset(ids), frozenset(captions), np.concatenate(pictures), similarity)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """Changes where what is kept out does."""
        fixed = [sorted(self.ids), sorted(self.captions), self.similarity]
        text = files.canonical_json(fixed).encode() + self.pictures.tobytes()
        return files.digest(text)

    def reasons(
        self, documents: list[document_types.Document], embeddings: dict[str, np.ndarray]
    ) -> list[str | None]:
        """Why each document is kept out: `excluded-id`, `excluded-picture`, `excluded-text`, None."""
        nearest = np.full(len(documents), -1.0)
        if len(self.pictures):
            nearest = (embeddings["image"] @ self.pictures.T).max(axis=1)
        return [self._reason(d, float(near)) for d, near in zip(documents, nearest, strict=True)]

    def _reason(self, document: document_types.Document, nearest: float) -> str | None:
        if document.id in self.ids:
            return "excluded-id"
        if document.image is not None:
            return "excluded-picture" if nearest >= self.similarity else None
        return "excluded-text" if shard_file.caption_hash(document.text) in self.captions else None


class Repeats:
    """Tells documents that say what an earlier one says and show nearly what it shows."""

    def __init__(self, similarity: float):
        """Pictures whose embeddings have at least this cosine count as the same."""
        self._similarity = similarity
        self._seen: dict[str, list[np.ndarray]] = {}

    def add(self, captions: Iterable[str], rows: Iterable[np.ndarray]) -> None:
        """Documents that are kept: caption hashes, and embeddings float32 [D] in the view image."""
        for caption, row in zip(captions, rows, strict=True):
            self._seen.setdefault(caption, []).append(row)

    def is_repeat(self, caption: str, row: np.ndarray) -> bool:
        """Whether one with this caption hash and embedding was kept before."""
        return any(float(row @ kept) >= self._similarity for kept in self._seen.get(caption, ()))


def _batches(
    items: Iterable[stream.Item], batch_size: int
) -> Iterable[list[document_types.Document]]:
    batch = []
    for item in items:
        if item.document is not None:
            batch.append(item.document)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch
