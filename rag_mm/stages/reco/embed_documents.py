"""Stage `document_pairs`: embeds any documents with the towers that a memory carries.

This is how RECO trains on imported weights: `rag-mm import clip`, `rag-mm memory build`, then this stage.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import document_types, progress, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import open_documents
from rag_mm.memory import model_protocols, retrieval_memory
from rag_mm.memory.writing import stream
from rag_mm.stages.reco import embed_pairs
from rag_mm.stages.shared import frozen

INPUTS = ()


@dataclasses.dataclass(frozen=True)
class DocumentPairsStageConfig:
    """Training documents and memory.

    Attributes:
        seed: unused; every chain has one.
        world: unused; every chain has one.
        documents: training documents, as for `--documents` of `rag-mm memory build`.
        memory: folder of a memory.
        max_documents: use only the first training documents, up to this number; None uses all.
        embed_batch: number of documents read and of images embedded at once.
    """

    seed: int
    world: Any
    documents: str = ""
    memory: str = ""
    max_documents: int | None = None
    embed_batch: int = 64

    def __post_init__(self):
        if self.embed_batch < 1 or (self.max_documents is not None and self.max_documents < 1):
            raise ValueError("embed_batch and max_documents must be at least 1")
        if not self.documents or not self.memory:
            raise ValueError(
                "documents or memory is empty; give --config.document_pairs.documents=... and "
                "--config.document_pairs.memory=..."
            )


def run(config: DocumentPairsStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Embeds the documents; bad records, and documents without image or text, are skipped.

    Returns:
        The numbers of training pairs (`train`) and memory rows (`memory`).

    Raises:
        UserError: there is no memory, it carries no retriever, or no document has an image and a text.
    """
    memory, encoder = open_memory(config.memory, config.embed_batch)
    train = _embed(config, encoder)
    unknown = np.full(len(memory), -1, np.int32)
    pairs = embed_pairs.EmbeddedPairs(
        train=train,
        memory=embed_pairs.Pairs(memory.embeddings("image"), memory.embeddings("text"), unknown),
        num_seen=len(memory),
        towers=encoder.fingerprint,
        test=embed_pairs.no_pairs(encoder.dim),
        prompts=np.zeros((0, 1, encoder.dim), np.float32),
        splits=np.zeros(0, np.int32),
        questions=embed_pairs.no_pairs(encoder.dim),
        captioned=embed_pairs.no_pairs(encoder.dim),
        caption_keys=np.zeros(0, np.int64),
    )
    embed_pairs.save(stage_dir, pairs)
    return {"train": len(train), "memory": len(memory)}


def open_memory(
    path: epath.PathLike, image_batch: int | None = None
) -> tuple[retrieval_memory.Memory, frozen.FrozenRetriever]:
    """Opens a memory with the towers that it carries, which encode `image_batch` images at once.

    Raises:
        UserError: there is no memory, or it carries no retriever.
    """
    memory = retrieval_memory.Memory.open(path)
    encoder = frozen.FrozenRetriever(memory.carried("retriever"), image_batch)
    memory.attach(encoder)
    return memory, encoder


def _embed(config: DocumentPairsStageConfig, encoder: frozen.FrozenRetriever) -> embed_pairs.Pairs:
    parts = [embed_pairs.no_pairs(encoder.dim)]
    source = open_documents.open_documents(config.documents)
    total = config.max_documents or source.size or 0
    done = 0
    with progress.track("document_pairs", total) as bar:
        for batch in _batches(source, config):
            embeddings = model_protocols.embed(batch, encoder)
            unknown = np.full(len(batch), -1, np.int32)
            parts.append(embed_pairs.Pairs(embeddings["image"], embeddings["text"], unknown))
            done += len(batch)
            bar.update(done)
    if not done:
        raise UserError(f"{config.documents} has no document with both an image and a text.")
    return sum(parts[1:], parts[0])


def _batches(
    source: stream.RecordStream, config: DocumentPairsStageConfig
) -> Iterator[list[document_types.Document]]:
    batch: list[document_types.Document] = []
    count = 0
    for item in source.read(0):
        if count == config.max_documents:
            break
        document = item.document
        if document is not None and document.image is not None and document.text.strip():
            batch.append(document)
            count += 1
        if len(batch) == config.embed_batch:
            yield batch
            batch = []
    if batch:
        yield batch
