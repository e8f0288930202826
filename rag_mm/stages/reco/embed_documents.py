"""Stage `document_pairs`: pairs of any documents and any memory, embedded by the towers the memory carries.

This is how RECO trains on weights of your own: `rag-mm import clip`, `rag-mm memory build`, then this.
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
    """What is paired.

    Attributes:
        seed: of nothing here; every chain has one.
        world: likewise.
        documents: to train on, as `--documents` of `rag-mm memory build` names them.
        memory: the folder of a memory.
        max_documents: of the training documents the first so many; None takes all.
        embed_batch: documents embedded at once.
    """

    seed: int
    world: Any
    documents: str = ""
    memory: str = ""
    max_documents: int | None = None
    embed_batch: int = 64

    def __post_init__(self):
        if self.embed_batch < 1 or (self.max_documents is not None and self.max_documents < 1):
            raise ValueError("embed_batch and max_documents are at least 1")
        if not self.documents or not self.memory:
            raise ValueError(
                "name the training documents and the memory: --config.document_pairs.documents=... "
                "--config.document_pairs.memory=..."
            )


def run(config: DocumentPairsStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Embeds the documents; a bad record is passed over, and one without picture or text."""
    memory, encoder = open_memory(config.memory)
    train = _embed(config, encoder)
    unknown = np.full(len(memory), -1, np.int32)
    found = embed_pairs.EmbeddedPairs(
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
    embed_pairs.save(stage_dir, found)
    return {"train": len(train), "memory": len(memory)}


def open_memory(path: epath.PathLike) -> tuple[retrieval_memory.Memory, frozen.FrozenRetriever]:
    """A memory and the towers that it carries, attached.

    Raises:
        UserError: there is no memory, or it carries no retriever.
    """
    memory = retrieval_memory.Memory.open(path)
    encoder = frozen.FrozenRetriever(memory.carried("retriever"))
    memory.attach(encoder)
    return memory, encoder


def _embed(config: DocumentPairsStageConfig, encoder: frozen.FrozenRetriever) -> embed_pairs.Pairs:
    parts = [embed_pairs.no_pairs(encoder.dim)]
    source = open_documents.open_documents(config.documents)
    total = config.max_documents or source.size or 0
    done = 0
    with progress.track("document_pairs", total) as bar:
        for batch in _batches(source, config):
            rows = model_protocols.embed(batch, encoder, config.embed_batch)
            alone = np.full(len(batch), -1, np.int32)
            parts.append(embed_pairs.Pairs(rows["image"], rows["text"], alone))
            done += len(batch)
            bar.update(done)
    if not done:
        raise UserError(f"{config.documents} has no document with a picture and a text.")
    return sum(parts[1:], parts[0])


def _batches(
    source: stream.RecordStream, config: DocumentPairsStageConfig
) -> Iterator[list[document_types.Document]]:
    batch: list[document_types.Document] = []
    taken = 0
    for item in source.read(0):
        if taken == config.max_documents:
            break
        found = item.document
        if found is not None and found.image is not None and found.text.strip():
            batch.append(found)
            taken += 1
        if len(batch) == config.embed_batch:
            yield batch
            batch = []
    if batch:
        yield batch
