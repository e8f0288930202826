"""Stage `neighbors`: retrieves the neighbors of all training and test documents before training starts.

As at inference, a query is one modality of the main document, never the whole: its image, or one of its
captions, from which training drops words (docs/papers/ra_cm3.md#retrieval). With neighbors computed in
advance, a training step is a pure function and a resumed run reads the same documents.

Several processes (`core.processes.join`) that all call `run` share the training queries; process 0 writes.
"""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np
from etils import epath

from rag_mm.core import checks, files, progress, run_folder
from rag_mm.core.document_types import Document, Text
from rag_mm.core.errors import UserError
from rag_mm.memory import policy, retrieval_memory, shared_encoding
from rag_mm.stages.shared import build_memory, world_config
from rag_mm.worlds.emoji import emoji_scenes

INPUTS = ("retriever", "memory")
POLICY = "policy.json"  # Retrieval settings that inference must use too.
TEST_SPLITS = {"held_out": world_config.HELD_OUT, "seen": world_config.SEEN}
QUERIES = (
    "text",
    "image",
    "text_of_seen",
)  # The last one searches the memory without held-out classes.


@dataclasses.dataclass(frozen=True)
class NeighborsStageConfig:
    """How neighbors are retrieved for training documents and test documents.

    Attributes:
        seed: seed of the words dropped from queries and of the choice of test documents.
        world: world of the documents.
        num_neighbors: number of neighbors of each query.
        captions_per_image: captions of each training document used as queries; must equal the decoder's.
        word_dropout: probability of dropping each word of a training query (RA-CM3: 20 %).
        max_similarity: hits with a higher cosine to the query or to a chosen neighbor are skipped as
            redundant; None calibrates the bound on the classes of the memory. RA-CM3 uses 0.9 with CLIP.
        split_phrases: split captions at " and " and retrieve for each phrase, at inference too. Words are
            dropped first, so a fifth of the training captions with two entities remain one query.
        num_test: number of test documents of held-out classes, and of seen classes.
        min_same_class: retrieval check; the chain stops if a smaller share of the neighbors of held-out
            captions shows the class that the caption names. 0 disables it.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    num_neighbors: int = 2
    captions_per_image: int = 4
    word_dropout: float = 0.2
    max_similarity: float | None = None
    split_phrases: bool = False
    num_test: int = 256
    min_same_class: float = 0.0

    def __post_init__(self):
        checks.at_least(self, 1, "num_neighbors", "captions_per_image", "num_test")
        checks.at_least(self, -1, "max_similarity")
        checks.below_one(self, "word_dropout")
        checks.between(self, 0, 1, "min_same_class")
        if isinstance(self.world, world_config.OwnImages) and not self.max_similarity:
            raise ValueError(
                "max_similarity cannot be calibrated on your own images, which have no classes; "
                "give a cosine, such as 0.9"
            )


def run(config: NeighborsStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Retrieves all neighbors and writes them as memory rows, int32, -1 for a missing neighbor.

    - `train.npy` [R, captions_per_image + 1, K]: for each caption query, then for the image query;
    - `SPLIT_rows.npy` [Q]: which of the world's test documents are tested, for each of `TEST_SPLITS`;
    - `SPLIT_QUERY.npy` [Q, K]: their neighbors, for each of `QUERIES`;
    - `policy.json`: the retrieval settings.

    Returns:
        The similarity bound, and for emoji scenes the share of neighbors that show the right class.

    Raises:
        UserError: the retrieval check failed (`min_same_class`).
    """
    seen_memory = build_memory.open_memory(run, version=build_memory.SEEN_VERSION)
    whole_memory = build_memory.open_memory(run)
    facts = memory_facts(config.world) if isinstance(config.world, world_config.EmojiWorld) else []
    bound = config.max_similarity or _calibrate(config, seen_memory, facts)
    same_class = {}
    for split, names in TEST_SPLITS.items():
        source = config.world.scenes("test", *names)
        rows = world_config.sample_rows(source, config.num_test, config.seed)
        captions = [source.full_caption(int(row)) for row in rows]
        by_text = _encode(config, whole_memory, captions)
        by_image = whole_memory.encode(image=world_config.images(source, rows)), None
        searches = (whole_memory, by_text), (whole_memory, by_image), (seen_memory, by_text)
        neighbors = {
            name: _find(config, memory, *queries, source, rows, bound)
            for name, (memory, queries) in zip(QUERIES, searches, strict=True)
        }
        for name, array in ({"rows": rows} | neighbors).items():
            _write(stage_dir / f"{split}_{name}.npy", array)
        if isinstance(source, emoji_scenes.Scenes):
            same_class[split] = _same_class(source, rows, neighbors["text"], facts)
    if same_class:
        _check_retrieval(config, same_class["held_out"])
    _write(stage_dir / "train.npy", _train_neighbors(config, seen_memory, bound))
    if jax.process_index() == 0:
        settings = {"max_similarity": bound, "split_phrases": config.split_phrases}
        files.write_json(stage_dir / POLICY, settings)
    if not same_class:
        return {"neighbors": {"max_similarity": bound}}
    return {
        "neighbors": {"max_similarity": bound, "same_class": same_class},
        "retriever": {"same_class_at_2": same_class["held_out"]},
    }


def load_policy(run: run_folder.Run) -> tuple[float, bool]:
    """The retrieval policy of a run: `max_similarity`, and whether captions are split into phrases.

    Raises:
        UserError: the stage is missing, unfinished or edited.
    """
    rules = files.read_json(run.finished_stage("neighbors") / POLICY)
    # Earlier runs call it by_phrase, the first ones lack it.
    return rules["max_similarity"], rules.get("split_phrases", rules.get("by_phrase", False))


def _write(path: epath.Path, array: np.ndarray) -> None:
    if jax.process_index() == 0:
        files.write_array(path, array)


def _check_retrieval(config: NeighborsStageConfig, same_class: float) -> None:
    if same_class < config.min_same_class:
        raise UserError(
            f"Retrieval check failed: {100 * same_class:.1f} % of the neighbors of held-out captions "
            f"show the class asked for, neighbors.min_same_class is {100 * config.min_same_class:g} %; "
            "train the retriever on shorter captions (retriever.captions_per_image), train it longer "
            "(retriever.loop.num_steps), or lower neighbors.min_same_class."
        )


def _train_neighbors(
    config: NeighborsStageConfig, memory: retrieval_memory.Memory, bound: float
) -> np.ndarray:
    source = config.world.scenes("train", *world_config.SEEN)
    part, columns = range(len(source))[shared_encoding.local_slice(len(source))], []
    rows = part or range(1)  # A process without a share still takes part in the encoding.
    with progress.track("neighbors", total=config.captions_per_image + 1) as bar:
        for caption_index in range(config.captions_per_image):
            texts = [_dropped_caption(config, source, i, caption_index) for i in rows]
            queries = _encode(config, memory, texts)
            columns.append(_find(config, memory, *queries, source, rows, bound))
            bar.update(caption_index + 1)
        by_image = memory.encode(image=world_config.images(source, np.array(rows)))
        columns.append(_find(config, memory, by_image, None, source, rows, bound))
        bar.update(config.captions_per_image + 1)
    return shared_encoding.gather(np.stack(columns, axis=1)[: len(part)], len(source))


def memory_facts(world: world_config.EmojiWorld) -> list[emoji_scenes.Facts]:
    """The facts of every memory row, in order."""
    parts = (
        world.scenes("memory", *splits) for splits in (world_config.SEEN, world_config.HELD_OUT)
    )
    return [source.facts(row) for source in parts for row in range(len(source))]


def _keys(source: world_config.SplitDocuments, rows: Iterable[int]) -> np.ndarray:
    """Scenes of which all captions say the same are twins: one must not be the other's answer."""
    return np.array([policy.fact_key(source.full_caption(int(row))) for row in rows], np.int64)


def _memory_keys(world: world_config.EmojiWorld | world_config.OwnImages) -> np.ndarray:
    parts = [_keys(source, range(len(source))) for source in build_memory.sources(world)]
    return np.concatenate(parts)


def _dropped_caption(
    config: NeighborsStageConfig, source: world_config.SplitDocuments, row: int, caption_index: int
) -> str:
    """A caption from which words were dropped at random."""
    rng = np.random.default_rng((config.seed, 3, row, caption_index))
    document = Document(id="", segments=(Text(source.caption(row, caption_index)),))
    return str(policy.make_query(document, "text", rng, config.word_dropout))


def _calibrate(
    config: NeighborsStageConfig, memory: retrieval_memory.Memory, facts: list[emoji_scenes.Facts]
) -> float:
    classes = np.array([row_facts.entities[0].class_id for row_facts in facts[: len(memory)]])
    keys = _memory_keys(config.world)[: len(memory)]
    return policy.calibrate_max_similarity(memory.embeddings("mixed"), classes, keys)


def _encode(
    config: NeighborsStageConfig, memory: retrieval_memory.Memory, texts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Query embeddings float32 [P, D], and the number of queries of each text, int [Q]."""
    queries, counts = policy.split_queries(texts, config.split_phrases)
    return memory.encode(text=queries), counts


def _find(
    config: NeighborsStageConfig,
    memory: retrieval_memory.Memory,
    queries: np.ndarray,
    counts: np.ndarray | None,
    source: world_config.SplitDocuments,
    rows: Iterable[int],
    bound: float,
) -> np.ndarray:
    """Memory rows int32 [Q, K]; `queries` is float32 [P, D], with `counts` of them per document."""
    query_keys = _keys(source, rows)
    neighbors = policy.find_neighbors(
        memory.index("mixed").search,
        queries,
        memory.embeddings("mixed"),
        num_neighbors=config.num_neighbors,
        max_similarity=bound,
        query_rows=np.full(len(query_keys), -1),
        query_keys=query_keys,
        row_keys=_memory_keys(config.world)[: len(memory)],
        counts=counts,
    )
    return neighbors.ids


def _same_class(
    source: emoji_scenes.Scenes, rows: np.ndarray, ids: np.ndarray, facts: list[emoji_scenes.Facts]
) -> float:
    """Share of neighbors that show a class of the query's scene; missing neighbors count as wrong."""

    def classes(scene: emoji_scenes.Facts) -> set[int]:
        return {entity.class_id for entity in scene.entities}

    is_same = [
        bool(classes(facts[i]) & classes(source.facts(int(row))))
        for row, neighbors in zip(rows, ids, strict=True)
        for i in neighbors
        if i >= 0
    ]
    return sum(is_same) / ids.size
