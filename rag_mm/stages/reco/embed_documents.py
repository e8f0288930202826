"""Stage `document_pairs`: embeds any documents with the towers that a memory carries, in shards.

This is how RECO trains on imported weights: `rag-mm import clip`, `rag-mm memory build`, then this stage.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from rag_mm.core import document_types, processes, progress, run_folder
from rag_mm.core.errors import UserError
from rag_mm.corpus import folder_parts
from rag_mm.data import open_documents, source_ranges
from rag_mm.memory import model_protocols, retrieval_memory
from rag_mm.memory.writing import stream
from rag_mm.models import reco
from rag_mm.stages import multiprocess
from rag_mm.stages.reco import stored_pairs
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
        max_documents: use only the first training documents, up to this number; None uses all. Bad ones
            count, except in tars, which are embedded whole.
        embed_batch: number of documents read and of images embedded at once.
        shard_size: documents of a shard, which a process embeds on its own and which is not embedded again
            after a kill; a tar is one shard.
    """

    seed: int
    world: Any
    documents: str = ""
    memory: str = ""
    max_documents: int | None = None
    embed_batch: int = 64
    shard_size: int = 16_384

    def __post_init__(self):
        if min(self.embed_batch, self.shard_size, self.max_documents or 1) < 1:
            raise ValueError("embed_batch, shard_size and max_documents must be at least 1")
        if not self.documents or not self.memory:
            raise ValueError(
                "documents or memory is empty; give --config.document_pairs.documents=... and "
                "--config.document_pairs.memory=..."
            )


def run(config: DocumentPairsStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Embeds the documents; bad records, and documents without image or text, are skipped.

    Every process embeds whole shards, so the files are the same for any number of them.

    Returns:
        The numbers of training pairs (`train`), of their shards and of memory rows (`memory`); {} in
        followers.

    Raises:
        UserError: there is no memory, it carries no retriever, or no document has an image and a text.
    """
    memory, encoder = open_memory(config.memory, config.embed_batch)
    source = open_documents.open_documents(config.documents)
    parts, root = _parts(source, config), Path(stage_dir / stored_pairs.TRAIN)
    done = 0
    with progress.track("document_pairs", config.max_documents or source.size or 0) as bar:

        def make(number: int) -> tuple[dict[str, Any], Sequence[Path]]:
            nonlocal done
            columns = _embed(_documents(source, parts[number]), config.embed_batch, encoder)
            rows = len(columns["image"])
            done += rows
            bar.update(done * jax.process_count())
            paths = stored_pairs.write_shard(root, number, columns, np.float16)
            return {"rows": rows}, paths

        marks = folder_parts.run(root, _plan(source, encoder, config), len(parts), make)
    processes.broadcast_from_leader("embedded")
    if not multiprocess.is_leader():
        return {}
    rows = [mark["rows"] for mark in marks or ()]
    count = min(sum(rows), config.max_documents or sum(rows))
    if not count:
        raise UserError(f"{config.documents} has no document with both an image and a text.")
    used = stored_pairs.UsedMemory.of(memory)
    stored_pairs.finish(stage_dir, rows, count, encoder.dim, encoder.fingerprint, used)
    return {"train": count, "shards": len(rows), "memory": len(memory)}


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


def _parts(
    source: stream.RecordStream, config: DocumentPairsStageConfig
) -> list[source_ranges.Range]:
    parts = source_ranges.split(source, config.shard_size)
    if source.size is None or config.max_documents is None:  # The size of a tar says nothing.
        return parts
    return [
        dataclasses.replace(part, stop=min(part.stop, config.max_documents))
        for part in parts
        if part.start < config.max_documents
    ]


def _plan(
    source: stream.RecordStream, encoder: frozen.FrozenRetriever, config: DocumentPairsStageConfig
) -> dict[str, Any]:
    return {
        "what": "pairs",
        "source": source.fingerprint,
        "towers": encoder.fingerprint,
        "shard_size": config.shard_size,
        "max_documents": config.max_documents,
        "embed_batch": config.embed_batch,
    }


def _documents(
    source: stream.RecordStream, part: source_ranges.Range
) -> Iterator[document_types.Document]:
    for item in source_ranges.read(source, part):
        document = item.document
        if document is not None and document.image is not None and document.text.strip():
            yield document


def _embed(
    documents: Iterator[document_types.Document], size: int, encoder: frozen.FrozenRetriever
) -> dict[str, np.ndarray]:
    """Embeddings of both modalities, float32 [n, D]."""
    found: dict[str, list[np.ndarray]] = {
        name: [np.zeros((0, encoder.dim), np.float32)] for name in reco.MODALITIES
    }
    while batch := list(itertools.islice(documents, size)):
        embeddings = model_protocols.embed(batch, encoder)
        for name, parts in found.items():
            parts.append(embeddings[name])
    return {name: np.concatenate(parts) for name, parts in found.items()}
