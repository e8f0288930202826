"""Filters for documents that should not be in a memory: evaluation documents and near-duplicates."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from rag_mm.core import document_types, files
from rag_mm.memory import model_protocols
from rag_mm.memory.store import shard_file
from rag_mm.memory.writing import stream


@dataclasses.dataclass(frozen=True, eq=False)
class ExclusionSet:
    """Documents that must not enter a memory, nor anything nearly identical to them.

    A document is excluded if it has the id of one of them; if its image embedding has a cosine of at least
    `similarity` with one of theirs; or, without an image, if its text equals one of theirs up to case,
    punctuation and spacing.

    Attributes:
        ids: ids of the documents.
        captions: text hashes of the documents without an image.
        image_embeddings: float32 [E, D], unit length.
        similarity: minimum cosine of images that count as nearly identical.
    """

    ids: frozenset[str]
    captions: frozenset[str]
    image_embeddings: np.ndarray
    similarity: float

    @classmethod
    def from_documents(
        cls,
        documents: stream.Documents | stream.RecordStream,
        encoder: model_protocols.Encoder,
        similarity: float = 0.98,
        batch_size: int = 256,
    ) -> "ExclusionSet":
        """Embeds the documents' images; bad records are skipped."""
        ids, captions, embeddings = [], [], [np.zeros((0, encoder.dim), np.float32)]
        for batch in _batches(stream.as_source(documents).read(0), batch_size):
            ids += [document.id for document in batch]
            with_image = [d for d in batch if d.image is not None]
            text_only = [d for d in batch if d.image is None]
            captions += [shard_file.caption_hash(d.text) for d in text_only]
            if with_image:
                embedded = model_protocols.embed(with_image, encoder)
                embeddings.append(embedded["image"])
        return cls(frozenset(ids), frozenset(captions), np.concatenate(embeddings), similarity)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides which documents are excluded."""
        fields = [sorted(self.ids), sorted(self.captions), self.similarity]
        return files.digest(files.canonical_json(fields).encode() + self.image_embeddings.tobytes())

    def reasons(
        self, documents: list[document_types.Document], embeddings: dict[str, np.ndarray]
    ) -> list[str | None]:
        """Why each document is excluded: `excluded-id`, `excluded-picture`, `excluded-text`; None if not."""
        max_cosine = np.full(len(documents), -1.0)
        if len(self.image_embeddings):
            max_cosine = (embeddings["image"] @ self.image_embeddings.T).max(axis=1)
        return [
            self._reason(d, float(cosine)) for d, cosine in zip(documents, max_cosine, strict=True)
        ]

    def _reason(self, document: document_types.Document, max_cosine: float) -> str | None:
        if document.id in self.ids:
            return "excluded-id"
        if document.image is not None:
            return "excluded-picture" if max_cosine >= self.similarity else None
        return "excluded-text" if shard_file.caption_hash(document.text) in self.captions else None


class DuplicateFilter:
    """Finds documents with the same caption as an earlier document and a nearly identical image."""

    def __init__(self, similarity: float):
        """Images whose embeddings have at least this cosine count as identical."""
        self._similarity = similarity
        self._seen: dict[str, list[np.ndarray]] = {}

    def add(self, captions: Iterable[str], embeddings: Iterable[np.ndarray]) -> None:
        """Registers kept documents: caption hashes, and embeddings float32 [D] of the view `image`."""
        for caption, embedding in zip(captions, embeddings, strict=True):
            self._seen.setdefault(caption, []).append(embedding)

    def is_duplicate(self, caption: str, embedding: np.ndarray) -> bool:
        """Whether a registered document has this caption hash and a nearly identical embedding."""
        return any(
            float(embedding @ earlier) >= self._similarity
            for earlier in self._seen.get(caption, ())
        )


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
