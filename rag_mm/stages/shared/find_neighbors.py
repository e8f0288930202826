"""Stage `neighbors`: retrieves the neighbors of all training and test documents before training starts.

As at inference, a query is one modality of the main document, never the whole: its image, or one of its
captions, from which training drops words (docs/papers/ra_cm3.md#retrieval). With neighbors computed in
advance, a training step is a pure function and a resumed run reads the same documents.

Several processes (`core.processes.join`) that all call `run` share the training queries; process 0 writes.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from rag_mm.core import caption_text, checks, configuration, files, progress, run_folder
from rag_mm.core.document_types import Document, Text
from rag_mm.core.errors import UserError
from rag_mm.memory import policy, retrieval_memory, shared_encoding
from rag_mm.stages.shared import build_memory, frozen, train_tokenizer, world_config
from rag_mm.worlds.emoji import emoji_scenes

INPUTS = ("tokenizer", "retriever", "memory")
POLICY = "policy.json"  # Retrieval settings that inference must use too.
TEST_SPLITS = {"held_out": world_config.TEST, "seen": world_config.SEEN}
TUNE_SPLITS = {
    "tune": world_config.TUNE
}  # Read by the retrieval check and while the decoder trains.
# What is asked; the last searches the memory without held-out classes.
QUERIES = ("text", "image", "text_of_seen")


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
            redundant; None for no bound. RA-CM3 uses 0.9 with CLIP; a small retriever gives nearly all images
            of a class a higher one.
        max_equal_codes: hits are skipped as redundant if a larger share of their image codes equals, position
            by position, the codes of the query's image or of a chosen neighbor; 1 for no bound.
        split_phrases: split captions at " and " and retrieve for each phrase, at inference too. Words are
            dropped first, so a fifth of the training captions with two entities remain one query.
        num_test: number of test documents of test, of seen and of tune classes.
        min_same_class: retrieval check; the chain stops if a smaller share of the neighbors of captions of
            tune classes shows the class that the caption names. 0 disables it.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    num_neighbors: int = 2
    captions_per_image: int = 4
    word_dropout: float = 0.2
    max_similarity: float | None = None
    max_equal_codes: float = 1.0
    split_phrases: bool = False
    num_test: int = 256
    min_same_class: float = 0.0

    def __post_init__(self):
        checks.at_least(self, 1, "num_neighbors", "captions_per_image", "num_test")
        checks.at_least(self, -1, "max_similarity")
        checks.below_one(self, "word_dropout")
        checks.between(self, 0, 1, "min_same_class", "max_equal_codes")

    @property
    def rules(self) -> policy.Rules:
        """The settings that inference must use too."""
        return policy.Rules(self.max_similarity, self.max_equal_codes, self.split_phrases)


def run(config: NeighborsStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Retrieves all neighbors and writes them as memory rows, int32, -1 for a missing neighbor.

    - `train.npy` [R, captions_per_image + 1, K]: for each caption query, then for the image query;
    - `SPLIT_rows.npy` [Q]: which of the world's test documents are tested, for each of `TEST_SPLITS` and
      `TUNE_SPLITS`;
    - `SPLIT_QUERY.npy` [Q, K]: their neighbors, for each of `QUERIES`;
    - `policy.json`: the retrieval settings.

    Returns:
        The bounds, how alike the two neighbors of a training caption are (`_alikeness`), and for emoji
        scenes in the run's own memory the share of neighbors that show the right class.

    Raises:
        UserError: the retrieval check failed (`min_same_class`), on tune classes.
    """
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    is_given = build_memory.is_given(run)
    whole_memory = seen_memory = _Searcher(
        config, build_memory.open_memory(run), image_tokenizer, is_given
    )
    facts: list[emoji_scenes.Facts] = []
    if not is_given:
        seen = build_memory.open_memory(run, build_memory.SEEN_VERSION)
        seen_memory = dataclasses.replace(whole_memory, memory=seen)
        if isinstance(config.world, world_config.EmojiWorld):
            facts = memory_facts(config.world)
    same_class = {}
    for split, names in (TEST_SPLITS | TUNE_SPLITS).items():
        source = config.world.scenes("test", *names)
        rows = world_config.sample_rows(source, config.num_test, config.seed)
        captions = [source.full_caption(int(row)) for row in rows]
        neighbors = {
            "text": whole_memory.by_text(source, rows, captions),
            "image": whole_memory.by_image(source, rows),
            "text_of_seen": seen_memory.by_text(source, rows, captions),
        }
        for name, array in ({"rows": rows} | neighbors).items():
            _write(stage_dir / f"{split}_{name}.npy", array)
        if facts and isinstance(source, emoji_scenes.Scenes):
            same_class[split] = _same_class(source, rows, neighbors["text"], facts)
    if same_class:
        _check_retrieval(config, same_class["tune"])
    train = _train_neighbors(config, seen_memory)
    _write(stage_dir / "train.npy", train)
    if jax.process_index() == 0:
        files.write_json(stage_dir / POLICY, dataclasses.asdict(config.rules))
    bounds = {name: getattr(config, name) for name in ("max_similarity", "max_equal_codes")}
    figures: dict[str, Any] = {"neighbors": bounds | _alikeness(seen_memory.memory, train[:, 0])}
    if same_class:
        figures["neighbors"]["same_class"] = same_class
        figures["retriever"] = {"same_class_at_2": same_class["held_out"]}
    return figures


def load_policy(run: run_folder.Run, decoder: str | None = None) -> policy.Rules:
    """The retrieval rules of a run.

    Args:
        run: the run.
        decoder: stage of its decoder, which has the rules where it was trained on corpora; None: `neighbors`.

    Raises:
        UserError: the stage is missing, unfinished or edited.
    """
    is_own = decoder is not None and (run.stage_dir(decoder) / POLICY).exists()
    path = run.finished_stage(decoder if decoder and is_own else "neighbors") / POLICY
    rules = files.read_object(path)
    # Earlier runs call it by_phrase, the first ones lack it.
    split_phrases = rules.get("split_phrases", rules.get("by_phrase", False))
    values = {
        "max_similarity": rules.get("max_similarity"),
        "max_equal_codes": rules.get("max_equal_codes", 1.0),
        "split_phrases": split_phrases,
    }
    return configuration.make(policy.Rules, values, str(path))


@dataclasses.dataclass(frozen=True, eq=False)
class _Searcher:
    """Searches one version of a memory by the rules of the config."""

    config: NeighborsStageConfig
    memory: retrieval_memory.Memory
    image_tokenizer: frozen.FrozenTokenizer
    is_given: bool  # so that its rows are not those of the world

    def by_text(
        self, source: world_config.SplitDocuments, rows: Iterable[int], texts: list[str]
    ) -> np.ndarray:
        """The neighbors of documents of `source`, by a text for each: int32 [Q, K]."""
        queries, counts = policy.split_queries(texts, self.config.split_phrases)
        return self._find(source, rows, self.memory.encode(text=queries), counts)

    def by_image(self, source: world_config.SplitDocuments, rows: np.ndarray) -> np.ndarray:
        """The neighbors of documents of `source`, by their images: int32 [Q, K]."""
        images = world_config.images(source, rows)
        codes = self.image_tokenizer.encode(images) if self.config.max_equal_codes < 1 else None
        return self._find(source, rows, self.memory.encode(image=images), query_codes=codes)

    def _find(
        self,
        source: world_config.SplitDocuments,
        rows: Iterable[int],
        queries: np.ndarray,
        counts: np.ndarray | None = None,
        query_codes: np.ndarray | None = None,
    ) -> np.ndarray:
        query_keys = _keys(source, rows)
        neighbors = policy.find_neighbors(
            self.memory.index("mixed").search,
            queries,
            self.memory.embeddings("mixed"),
            num_neighbors=self.config.num_neighbors,
            query_rows=np.full(len(query_keys), -1),
            query_keys=query_keys,
            row_keys=self._row_keys,
            counts=counts,
            **self.config.rules.bounds(self.memory.read_codes, query_codes),
        )
        return neighbors.ids

    @functools.cached_property
    def _row_keys(self) -> np.ndarray:
        if self.is_given:
            rows = range(len(self.memory))
            return np.array([_key(self.memory.document(row).text) for row in rows], np.int64)
        parts = [_keys(part, range(len(part))) for part in build_memory.sources(self.config.world)]
        return np.concatenate(parts)[: len(self.memory)]


def _write(path: epath.Path, array: np.ndarray) -> None:
    if jax.process_index() == 0:
        files.write_array(path, array)


def _check_retrieval(config: NeighborsStageConfig, same_class: float) -> None:
    if same_class < config.min_same_class:
        raise UserError(
            f"Retrieval check failed: {100 * same_class:.1f} % of the neighbors of captions of tune "
            "classes show the class asked for, neighbors.min_same_class is "
            f"{100 * config.min_same_class:g} %; "
            "train the retriever on shorter captions (retriever.captions_per_image), train it longer "
            "(retriever.loop.num_steps), or lower neighbors.min_same_class."
        )


def _train_neighbors(config: NeighborsStageConfig, memory: _Searcher) -> np.ndarray:
    source = config.world.scenes("train", *world_config.SEEN)
    part, columns = range(len(source))[shared_encoding.local_slice(len(source))], []
    rows = part or range(1)  # A process without a share still takes part in the encoding.
    with progress.track("neighbors", total=config.captions_per_image + 1) as bar:
        for caption_index in range(config.captions_per_image):
            texts = [_dropped_caption(config, source, i, caption_index) for i in rows]
            columns.append(memory.by_text(source, rows, texts))
            bar.update(caption_index + 1)
        columns.append(memory.by_image(source, np.array(rows)))
        bar.update(config.captions_per_image + 1)
    return shared_encoding.gather(np.stack(columns, axis=1)[: len(part)], len(source))


def _alikeness(memory: retrieval_memory.Memory, ids: np.ndarray) -> dict[str, float]:
    """Medians over pairs of first and second neighbor, int [Q, K]: their cosine and share of equal codes."""
    pairs = ids[(ids[:, :2] >= 0).all(axis=1), :2]
    if ids.shape[1] < 2 or not len(pairs):
        return {}
    vectors, codes = memory.embeddings("mixed"), memory.codes
    cosines = (vectors[pairs[:, 0]] * vectors[pairs[:, 1]]).sum(axis=1)
    figures = {"median_similarity_of_two": float(np.median(cosines))}
    if codes is not None:
        shares = policy.equal_share(codes[pairs[:, 0]], codes[pairs[:, 1]])
        figures["median_equal_codes_of_two"] = float(np.median(shares))
    return figures


def memory_facts(world: world_config.EmojiWorld) -> list[emoji_scenes.Facts]:
    """The facts of every memory row, in order."""
    parts = (
        world.scenes("memory", *splits) for splits in (world_config.SEEN, world_config.HELD_OUT)
    )
    return [source.facts(row) for source in parts for row in range(len(source))]


def _keys(source: world_config.SplitDocuments, rows: Iterable[int]) -> np.ndarray:
    """Scenes of which all captions say the same are twins: one must not be the other's answer."""
    return np.array([_key(source.full_caption(int(row))) for row in rows], np.int64)


def _key(caption: str) -> int:
    return policy.fact_key(caption_text.clean(caption))  # as a memory keeps it


def _dropped_caption(
    config: NeighborsStageConfig, source: world_config.SplitDocuments, row: int, caption_index: int
) -> str:
    """A caption from which words were dropped at random."""
    rng = np.random.default_rng((config.seed, 3, row, caption_index))
    document = Document(id="", segments=(Text(source.caption(row, caption_index)),))
    return str(policy.make_query(document, "text", rng, config.word_dropout))


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
