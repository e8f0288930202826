"""Stage `memory`: embeds and indexes the documents that may be retrieved.

Version 1 holds seen classes only; the neighbors of training documents come from it. Version 2 adds held-out
classes without retraining anything; it is used to test generation of entities that no model was trained on.
A memory may be given instead: then all of it may be retrieved while training.
"""

import dataclasses

import numpy as np
from etils import epath

from rag_mm.core import checks, manifest_values, progress, run_folder
from rag_mm.memory import retrieval_memory, shared_encoding
from rag_mm.memory.index import registry
from rag_mm.memory.index.exact import ExactIndex
from rag_mm.memory.store import manifest
from rag_mm.memory.writing import writer
from rag_mm.stages import multiprocess
from rag_mm.stages.shared import (
    frozen,
    given_memory,
    given_models,
    train_retriever,
    train_tokenizer,
    world_config,
)

INPUTS = ("tokenizer", "retriever")
SEEN_VERSION = 1


@dataclasses.dataclass(frozen=True)
class MemoryStageConfig(given_models.GivenConfig):
    """The memory and its index.

    Attributes:
        folder: memory to use where it lies, with its own index and the retriever that built it; None builds
            one from the world's documents.
        version: version of the memory in `folder`, so that later ones change nothing; None for its newest.
        seed: seed of the choice of queries for recall@10.
        world: world whose documents of role `memory` are stored.
        index: scann | exact | device.
        num_queries: number of captions that recall@10 of the index is measured with.
        image_batch: images that the retriever and the image tokenizer encode at once, a power of two; None
            for as many as have 2 ** 18 pixels in all, at most 256.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages | world_config.CorpusWorld
    index: str = "scann"
    num_queries: int = 500
    image_batch: int | None = dataclasses.field(default=None, metadata=manifest_values.ADDED_LATER)
    version: int | None = dataclasses.field(default=None, metadata=manifest_values.ADDED_LATER)

    def __post_init__(self):
        if self.folder is None and isinstance(self.world, world_config.CorpusWorld):
            raise ValueError("folder is None, but a corpus has no images to store; give one")
        if self.version is not None and self.folder is None:
            raise ValueError("version is that of a given memory; give its folder, too")
        self.identify(lambda folder: given_memory.fingerprint_of(folder, self.version))
        # The device index would use devices before the processes have joined.
        if self.index != "device":
            registry.make_index(self.index)
        checks.at_least(self, 1, "num_queries", "image_batch")


def run(config: MemoryStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Builds version 1, adds version 2, and compares the index with exact search.

    With several processes, all embed; the leader does everything else.

    Returns:
        `rows`, `index` and, unless the world has no images, `recall_at_10` in the leader, {} in followers.
    """
    encoder, image_tokenizer = (
        train_retriever.load_encoder(run.workdir, config.image_batch),
        train_tokenizer.load_tokenizer(run.workdir, config.image_batch),
    )
    if config.folder is not None:
        return _take_given(config, config.folder, encoder, image_tokenizer, stage_dir)
    assert not isinstance(config.world, world_config.CorpusWorld)
    seen, held_out = sources(config.world)
    carried = {
        "retriever": run.workdir / "retriever" / train_retriever.FOLDER,
        "tokenizer": run.workdir / "tokenizer" / train_tokenizer.FOLDER,
    }
    if not multiprocess.is_leader():
        shared_encoding.follow(encoder, image_tokenizer)
        return {}
    batch_size = shared_encoding.documents_at_once(encoder)
    with (
        shared_encoding.lead(encoder, image_tokenizer) as (shared_encoder, shared_tokenizer),
        progress.track("memory", total=len(seen) + len(held_out)) as bar,
    ):
        if not (stage_dir / "CURRENT").exists():
            options = writer.Options(
                index=config.index,
                batch_size=batch_size,
                on_progress=lambda done, total: bar.update(done),
            )
            retrieval_memory.Memory.build(
                stage_dir, seen, shared_encoder, shared_tokenizer, carried=carried, options=options
            )
        memory = retrieval_memory.Memory.open(stage_dir, shared_encoder)
        if memory.manifest.version == SEEN_VERSION:
            options = writer.Options(
                batch_size=batch_size, on_progress=lambda done, total: bar.update(len(seen) + done)
            )
            memory.add(held_out, shared_tokenizer, options=options)
    memory = retrieval_memory.Memory.open(stage_dir, encoder)
    return {"rows": len(memory), "index": config.index, "recall_at_10": _recall(config, memory)}


def _take_given(
    config: MemoryStageConfig,
    folder: str,
    encoder: frozen.FrozenRetriever,
    image_tokenizer: frozen.FrozenTokenizer,
    stage_dir: epath.Path,
) -> dict:
    memory = given_memory.take(folder, config.version, encoder, image_tokenizer, stage_dir)
    if memory is None:
        return {}
    config.check_unchanged(memory.fingerprint)
    facts = {"rows": len(memory), "index": memory.manifest.index}
    if isinstance(config.world, world_config.CorpusWorld):
        return facts
    return facts | {"recall_at_10": _recall(config, memory)}


def sources(
    world: world_config.EmojiWorld | world_config.OwnImages,
) -> tuple[world_config.SplitDocuments, world_config.SplitDocuments]:
    """The documents of versions 1 and 2, in the order of memory rows: seen classes, then held-out ones."""
    return world.scenes("memory", *world_config.SEEN), world.scenes(
        "memory", *world_config.HELD_OUT
    )


def open_memory(run: run_folder.Run, version: int | None = None) -> retrieval_memory.Memory:
    """Opens a version of the run's memory with its retriever; None is the one that the stage finished with.

    A given memory has one version, whichever is asked for.

    Versions that were added afterwards (`rag-mm memory add RUN/memory`) are for inference alone: the rows
    that other stages recorded are those of the stage's own versions.

    Raises:
        UserError: the stage is missing, unfinished or edited.
    """
    folder, stage = run.finished_stage("memory"), run.manifest("memory")
    if given_memory.read(folder) is not None:
        return given_memory.open_recorded(folder, train_retriever.load_encoder(run.workdir))
    if version is None and stage is not None:
        folders = (name.split("/")[0] for name in stage.outputs)
        version = max(filter(None, map(manifest.version_of, folders)))
    return retrieval_memory.Memory.open(
        folder, train_retriever.load_encoder(run.workdir), version=version
    )


def open_newest(
    run: run_folder.Run,
    encoder: frozen.FrozenRetriever,
    image_tokenizer: frozen.FrozenTokenizer,
) -> retrieval_memory.Memory:
    """Opens the newest version of the run's memory, own or given, for inference.

    Raises:
        UserError: there is no such memory, or `encoder` is not the retriever that built it; or the stage of a
            given one is unfinished or edited.
    """
    folder = run.stage_dir("memory")
    if given_memory.read(folder) is not None:
        return given_memory.open_newest(run.finished_stage("memory"), encoder, image_tokenizer)
    # Not `finished_stage`: users may add documents to a run's memory, and Memory.open checks it itself.
    return retrieval_memory.Memory.open(folder, encoder)


def is_given(run: run_folder.Run) -> bool:
    """Whether the run's memory was given; its rows are not documents of the world then."""
    return given_memory.read(run.finished_stage("memory")) is not None


def _recall(config: MemoryStageConfig, memory: retrieval_memory.Memory) -> float:
    """Recall@10 on test captions: the share of the exact ten neighbors that the index finds."""
    source = config.world.scenes("test", *world_config.SEEN, *world_config.TEST)
    rows = world_config.sample_rows(source, config.num_queries, config.seed)
    queries = memory.encode(text=[source.caption(int(row), 0) for row in rows])
    vectors, k = memory.embeddings("mixed"), min(10, len(memory))
    exact = ExactIndex()
    exact.build(vectors)
    exact_ids = exact.search(queries, k).ids
    found_ids = memory.search(vectors=queries, view="mixed", k=k).ids
    recalls = [np.isin(e, f).mean() for e, f in zip(exact_ids, found_ids, strict=True)]
    return float(np.mean(recalls))
