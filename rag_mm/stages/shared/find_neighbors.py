"""Stage `neighbors`: what every training and test document retrieves, decided before training starts.

Training asks with one modality of the main document, never with all of it, as inference does: with its
image, or with one of several captions from which words were dropped (docs/papers/ra_cm3.md#retrieval). So a
training step stays pure and a resumed run reads the same documents.

Several processes (`core.processes.join`) that all call `run` share the training queries; process 0 writes.
"""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np
from etils import epath

from rag_mm.core import files, progress, run_folder
from rag_mm.core.document_types import Document, Text
from rag_mm.core.errors import UserError
from rag_mm.memory import policy, retrieval_memory, shared_encoding
from rag_mm.stages.shared import build_memory, world_config
from rag_mm.worlds.emoji import emoji_scenes

INPUTS = ("retriever", "memory")
POLICY = "policy.json"  # what retrieval at inference must keep to as well
TEST_SPLITS = {"held_out": world_config.HELD_OUT, "seen": world_config.SEEN}
QUERIES = ("text", "image", "text_of_seen")  # the last one asks the memory without held-out classes


@dataclasses.dataclass(frozen=True)
class NeighborsStageConfig:
    """How neighbors are retrieved for training documents and test documents.

    Attributes:
        seed: of the tokens that are dropped from queries.
        world: where the documents come from.
        num_neighbors: neighbors of each query.
        captions_per_image: captions of each training document to query with; as many as the decoder's.
        token_dropout: probability of dropping each word of a training query (RA-CM3: 20 %).
        max_similarity: neighbors more similar than this cosine to the query, or to a chosen neighbor, are
            redundant and skipped; None calibrates it on the memory's classes, 0.9 is RA-CM3's value for CLIP.
        split_phrases: split captions at " and " and retrieve for each phrase, at inference too. Words are
            dropped first, so a fifth of the training captions with two entities are queried whole.
        num_test: test documents of each group of splits.
        min_same_class: the chain stops where a smaller share of the neighbors of held-out captions shows
            the class that the caption names.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    num_neighbors: int = 2
    captions_per_image: int = 4
    token_dropout: float = 0.2
    max_similarity: float | None = None
    split_phrases: bool = False
    num_test: int = 256
    min_same_class: float = 0.0

    def __post_init__(self):
        for name in ("num_neighbors", "captions_per_image", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, give at least 1")
        if not 0 <= self.token_dropout < 1:
            raise ValueError(f"token_dropout is {self.token_dropout}, give 0 up to 1")
        if not 0 <= self.min_same_class <= 1:
            raise ValueError(f"min_same_class is {self.min_same_class}, give 0 to 1")
        if isinstance(self.world, world_config.OwnImages) and not self.max_similarity:
            raise ValueError(
                "max_similarity is calibrated by classes, which your own images do not have; "
                "give a cosine, such as 0.9"
            )


def run(config: NeighborsStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Writes rows of the memory, int32, -1 where there is no neighbor:

    `train.npy` [R, captions_per_image + 1, K], the last column asked by image; and for each test split
    `SPLIT_rows.npy` [Q] (which test scenes) and, for each of `QUERIES`, `SPLIT_QUERY.npy` [Q, K].

    Raises:
        UserError: the neighbors do not pass the gate.
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
        asked = (whole_memory, by_text), (whole_memory, by_image), (seen_memory, by_text)
        found = {
            name: _find(config, memory, *queries, source, rows, bound)
            for name, (memory, queries) in zip(QUERIES, asked, strict=True)
        }
        for name, array in ({"rows": rows} | found).items():
            _write(stage_dir / f"{split}_{name}.npy", array)
        if isinstance(source, emoji_scenes.Scenes):
            same_class[split] = _same_class(source, rows, found["text"], facts)
    if same_class:
        _check_gate(config, same_class["held_out"])
    _write(stage_dir / "train.npy", _train_neighbors(config, seen_memory, bound))
    if jax.process_index() == 0:
        rules = {"max_similarity": bound, "split_phrases": config.split_phrases}
        files.write_json(stage_dir / POLICY, rules)
    if not same_class:
        return {"neighbors": {"max_similarity": bound}}
    return {
        "neighbors": {"max_similarity": bound, "same_class": same_class},
        "retriever": {"same_class_at_2": same_class["held_out"]},
    }


def _write(path: epath.Path, array: np.ndarray) -> None:
    if jax.process_index() == 0:
        files.write_array(path, array)


def _check_gate(config: NeighborsStageConfig, same_class: float) -> None:
    if same_class < config.min_same_class:
        raise UserError(
            f"The gate before the decoder is shut: {same_class:.3f} of the neighbors of held-out "
            f"captions show what was asked for, and neighbors.min_same_class is "
            f"{config.min_same_class}; show the retriever more captions that only name "
            "(retriever.captions_per_image), train it longer (retriever.loop.num_steps), or lower the gate."
        )


def _train_neighbors(
    config: NeighborsStageConfig, memory: retrieval_memory.Memory, bound: float
) -> np.ndarray:
    source = config.world.scenes("train", *world_config.SEEN)
    part, columns = range(len(source))[shared_encoding.local_slice(len(source))], []
    rows = part or range(1)  # One of many processes may have none, and asks all the same.
    with progress.track("neighbors", total=config.captions_per_image + 1) as bar:
        for draw in range(config.captions_per_image):
            texts = [_dropped_caption(config, source, i, draw) for i in rows]
            queries = _encode(config, memory, texts)
            columns.append(_find(config, memory, *queries, source, rows, bound))
            bar.update(draw + 1)
        by_image = memory.encode(image=world_config.images(source, np.array(rows)))
        columns.append(_find(config, memory, by_image, None, source, rows, bound))
        bar.update(config.captions_per_image + 1)
    return shared_encoding.gather(np.stack(columns, axis=1)[: len(part)], len(source))


def memory_facts(world: world_config.EmojiWorld) -> list[emoji_scenes.Facts]:
    """What each row of the memory shows."""
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
    config: NeighborsStageConfig, source: world_config.SplitDocuments, row: int, draw: int
) -> str:
    rng = np.random.default_rng((config.seed, 3, row, draw))
    asked = Document(id="", segments=(Text(source.caption(row, draw)),))
    return str(policy.make_query(asked, "text", rng, config.token_dropout))


def _calibrate(
    config: NeighborsStageConfig, memory: retrieval_memory.Memory, facts: list[emoji_scenes.Facts]
) -> float:
    seen = facts[: len(memory)]
    classes = np.array([shown.entities[0].class_id for shown in seen])
    keys = _memory_keys(config.world)[: len(memory)]
    return policy.calibrate_max_similarity(memory.embeddings("mixed"), classes, keys)


def _encode(
    config: NeighborsStageConfig, memory: retrieval_memory.Memory, texts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Queries float32 [P, D] and how many each text asks."""
    asked, counts = policy.split_queries(texts, config.split_phrases)
    return memory.encode(text=asked), counts


def _find(
    config: NeighborsStageConfig,
    memory: retrieval_memory.Memory,
    queries: np.ndarray,
    counts: np.ndarray | None,
    source: world_config.SplitDocuments,
    rows: Iterable[int],
    bound: float,
) -> np.ndarray:
    query_keys = _keys(source, rows)
    found = policy.find_neighbors(
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
    return found.ids


def _same_class(
    source: emoji_scenes.Scenes, rows: np.ndarray, ids: np.ndarray, facts: list[emoji_scenes.Facts]
) -> float:
    """Share of neighbors that show an entity that was asked for; a missing one does not."""

    def classes(shown: emoji_scenes.Facts) -> set[int]:
        return {entity.class_id for entity in shown.entities}

    right = [
        bool(classes(facts[i]) & classes(source.facts(int(row))))
        for row, found in zip(rows, ids, strict=True)
        for i in found
        if i >= 0
    ]
    return sum(right) / ids.size
