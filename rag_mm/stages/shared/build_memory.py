"""Stage `memory`: the documents that may be retrieved, embedded and indexed.

Version 1 holds seen classes only, and training neighbors come from it. Version 2 adds held-out classes:
no weight changes, and whether a model draws what it never saw is asked with it.
"""

import dataclasses

import jax
import numpy as np
from etils import epath

from rag_mm.core import progress, run_folder
from rag_mm.memory import retrieval_memory, shared_encoding
from rag_mm.memory.index import registry
from rag_mm.memory.index.exact import ExactIndex
from rag_mm.memory.writing import writer
from rag_mm.stages import multiprocess
from rag_mm.stages.shared import train_retriever, train_tokenizer, world_config

INPUTS = ("tokenizer", "retriever")
SEEN_VERSION = 1


@dataclasses.dataclass(frozen=True)
class MemoryStageConfig:
    """The memory and its index.

    Attributes:
        seed: of the queries that recall is measured with.
        world: whose documents of role `memory` are stored.
        index: scann | exact | device.
        num_queries: captions that recall@10 is measured with.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    index: str = "scann"
    num_queries: int = 500

    def __post_init__(self):
        # The device index would use devices before the processes have joined.
        if self.index != "device":
            registry.make_index(self.index)


def run(config: MemoryStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Builds version 1, adds version 2, measures the index against exact search.

    Several processes share the embedding; the first one does all else.
    """
    encoder, image_tokenizer = (
        train_retriever.load_encoder(run.workdir),
        train_tokenizer.load_tokenizer(run.workdir),
    )
    seen, held_out = sources(config.world)
    carried = {
        "retriever": run.workdir / "retriever" / train_retriever.FOLDER,
        "tokenizer": run.workdir / "tokenizer" / train_tokenizer.FOLDER,
    }
    if not multiprocess.is_leader():
        shared_encoding.follow(encoder, image_tokenizer)
        return {}
    batch_size = writer.Options.batch_size * jax.process_count()
    with (
        shared_encoding.lead(encoder, image_tokenizer) as (shared_encoder, shared_codec),
        progress.track("memory", total=len(seen) + len(held_out)) as bar,
    ):
        if not (stage_dir / "CURRENT").exists():
            options = writer.Options(
                index=config.index,
                batch_size=batch_size,
                on_progress=lambda done, total: bar.update(done),
            )
            retrieval_memory.Memory.build(
                stage_dir, seen, shared_encoder, shared_codec, carried=carried, options=options
            )
        memory = retrieval_memory.Memory.open(stage_dir, shared_encoder)
        if memory.manifest.version == SEEN_VERSION:
            options = writer.Options(
                batch_size=batch_size, on_progress=lambda done, total: bar.update(len(seen) + done)
            )
            memory.add(held_out, shared_codec, options=options)
    memory = retrieval_memory.Memory.open(stage_dir, encoder)
    return {"rows": len(memory), "index": config.index, "recall_at_10": _recall(config, memory)}


def sources(
    world: world_config.EmojiWorld | world_config.OwnImages,
) -> tuple[world_config.SplitDocuments, world_config.SplitDocuments]:
    """The memory's documents in row order: seen classes, then held-out ones."""
    return world.scenes("memory", *world_config.SEEN), world.scenes(
        "memory", *world_config.HELD_OUT
    )


def open_memory(run: run_folder.Run, version: int | None = None) -> retrieval_memory.Memory:
    """The run's memory with its retriever, at a version (the newest if None).

    Raises:
        UserError: the stage is missing, unfinished or edited.
    """
    folder = run.finished_stage("memory")
    return retrieval_memory.Memory.open(
        folder, train_retriever.load_encoder(run.workdir), version=version
    )


def _recall(config: MemoryStageConfig, memory: retrieval_memory.Memory) -> float:
    """Share of the ten exact neighbors of unseen captions that the index finds too."""
    source = config.world.scenes("test", *world_config.SEEN, *world_config.HELD_OUT)
    rows = world_config.sample_rows(source, config.num_queries, config.seed)
    queries = memory.encode(text=[source.caption(int(row), 0) for row in rows])
    vectors, k = memory.embeddings("mixed"), min(10, len(memory))
    exact = ExactIndex()
    exact.build(vectors)
    wanted = exact.search(queries, k).ids
    found = memory.search(vectors=queries, view="mixed", k=k).ids
    hits = [np.isin(want, got).mean() for want, got in zip(wanted, found, strict=True)]
    return float(np.mean(hits))
