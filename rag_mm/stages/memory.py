"""Stage `memory`: the documents that may be retrieved, embedded and indexed.

Version 1 holds seen classes only, and training neighbors come from it. Version 2 adds held-out classes:
no weight changes, and whether a model draws what it never saw is asked with it.
"""

import dataclasses

import jax
import numpy as np
from etils import epath

from rag_mm.core import progress
from rag_mm.core import run as run_lib
from rag_mm.memory import kinds, spread, writer
from rag_mm.memory import memory as memory_lib
from rag_mm.memory.exact import ExactIndex
from rag_mm.stages import retriever, team, tokenizer
from rag_mm.stages import world as world_lib

INPUTS = ("tokenizer", "retriever")
SEEN_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """`index` is `scann` or `exact`; recall is measured with `num_queries` captions."""

    seed: int
    world: world_lib.World | world_lib.Pictures
    index: str = "scann"
    num_queries: int = 500

    def __post_init__(self):
        if (
            self.index != "device"
        ):  # An index of devices would use them before processes have joined.
            kinds.make_index(self.index)


def run(config: Config, run: run_lib.Run, stage_dir: epath.Path) -> dict:
    """Builds version 1, adds version 2, measures the index against exact search.

    Several processes share the embedding; the first one does all else.
    """
    encoder, codec = retriever.load_encoder(run.workdir), tokenizer.load_tokenizer(run.workdir)
    seen, held_out = sources(config.world)
    carried = {
        "retriever": run.workdir / "retriever" / retriever.FOLDER,
        "tokenizer": run.workdir / "tokenizer" / tokenizer.FOLDER,
    }
    if not team.is_leader():
        spread.follow(encoder, codec)
        return {}
    batch_size = writer.Options.batch_size * jax.process_count()
    with (
        spread.lead(encoder, codec) as (shared_encoder, shared_codec),
        progress.track("memory", total=len(seen) + len(held_out)) as bar,
    ):
        if not (stage_dir / "CURRENT").exists():
            options = writer.Options(
                index=config.index,
                batch_size=batch_size,
                on_progress=lambda done, total: bar.update(done),
            )
            memory_lib.Memory.build(
                stage_dir, seen, shared_encoder, shared_codec, carried=carried, options=options
            )
        memory = memory_lib.Memory.open(stage_dir, shared_encoder)
        if memory.manifest.version == SEEN_VERSION:
            options = writer.Options(
                batch_size=batch_size, on_progress=lambda done, total: bar.update(len(seen) + done)
            )
            memory.add(held_out, shared_codec, options=options)
    memory = memory_lib.Memory.open(stage_dir, encoder)
    return {"rows": len(memory), "index": config.index, "recall_at_10": _recall(config, memory)}


def sources(
    world: world_lib.World | world_lib.Pictures,
) -> tuple[world_lib.Source, world_lib.Source]:
    """The memory's documents in row order: seen classes, then held-out ones."""
    return world.scenes("memory", *world_lib.SEEN), world.scenes("memory", *world_lib.HELD_OUT)


def open_memory(run: run_lib.Run, version: int | None = None) -> memory_lib.Memory:
    """The run's memory with its retriever, at a version (the newest if None).

    Raises:
        UserError: the stage is missing, unfinished or edited.
    """
    folder = run.finished_stage("memory")
    return memory_lib.Memory.open(folder, retriever.load_encoder(run.workdir), version=version)


def _recall(config: Config, memory: memory_lib.Memory) -> float:
    """Share of the ten exact neighbors of unseen captions that the index finds too."""
    source = config.world.scenes("test", *world_lib.SEEN, *world_lib.HELD_OUT)
    rows = world_lib.sample_rows(source, config.num_queries, config.seed)
    queries = memory.encode(text=[source.caption(int(row), 0) for row in rows])
    vectors, k = memory.embeddings("mixed"), min(10, len(memory))
    exact = ExactIndex()
    exact.build(vectors)
    wanted = exact.search(queries, k).ids
    found = memory.search(vectors=queries, view="mixed", k=k).ids
    hits = [np.isin(want, got).mean() for want, got in zip(wanted, found, strict=True)]
    return float(np.mean(hits))
