"""The scenes that Emu is tested on: their pictures' codes, candidates, and documents put before them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from rag_mm.core import files, image_files, run_folder
from rag_mm.data import interleaved
from rag_mm.data.interleaved import Parts
from rag_mm.stages.emu import training_documents
from rag_mm.stages.emu.album import Album
from rag_mm.stages.emu.saved_emu import LoadedEmu
from rag_mm.stages.shared import find_neighbors, frozen, world_config
from rag_mm.worlds.emoji import emoji_scenes
from rag_mm.worlds.emoji.emoji_scenes import Facts, Scenes

SPLITS = find_neighbors.TEST_SPLITS
# What is put before a test scene.
DOCUMENTS = ("none", "oracle", "retrieved", "wrong")
# Where a caption is to be written, it must not be what is searched with.
FOR_CAPTIONS = {"retrieved": "retrieved_by_image"}
_AT_ONCE = 256


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedPictures:
    """An album whose pictures are encoded when they are first asked for.

    Attributes:
        album: the pictures.
        encoder: the frozen tower.
        emu: the model.
    """

    album: Album
    encoder: frozen.FrozenRetriever
    emu: LoadedEmu
    _kept: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def codes(self) -> np.ndarray:
        """The codes of all pictures so far, float32 [P, N, R]."""
        return self._extended(
            "codes", lambda numbers: self.emu.codes(self.tokens(np.array(numbers)))
        )

    @property
    def vectors(self) -> np.ndarray:
        """The decoder's inputs for all pictures so far, float32 [P, N, D]."""
        codes = self.codes
        return self._extended(
            "vectors", lambda numbers: self.emu.vectors(codes[numbers.start : numbers.stop])
        )

    def _extended(self, name: str, make: Callable[[range], np.ndarray]) -> np.ndarray:
        """The arrays of all pictures so far: those of an earlier call, and `make` of the others."""
        parts = [self._kept[name]] if name in self._kept else []
        start, total = sum(map(len, parts)), len(self.album)
        for first in range(start, total, _AT_ONCE):
            parts.append(make(range(first, min(first + _AT_ONCE, total))))
        if start < total:
            self._kept[name] = np.concatenate(parts)
        return self._kept[name]

    def pixels(self, numbers: np.ndarray) -> np.ndarray:
        """Pictures uint8 [B, H, W, 3]."""
        return np.stack([self.album.pixels(int(number)) for number in numbers])

    def tokens(self, numbers: np.ndarray) -> np.ndarray:
        """What the model reads of pictures: tokens of the frozen tower, or pixels for its own."""
        pixels = self.pixels(numbers)
        if not self.emu.config.has_tower:
            return self.encoder.encode_image_tokens(pixels)
        size = self.emu.config.vision.image_size
        return np.stack([image_files.fit(each, size) for each in pixels])


@dataclasses.dataclass(frozen=True, eq=False)
class TestedScenes:
    """The tested scenes of a split.

    Attributes:
        scenes: all of the split's test scenes.
        rows: int64 [Q], those that are tested.
        pairs: the caption and the picture of each.
        documents: by name (`DOCUMENTS`, and `FOR_CAPTIONS`), the parts before each, caption first; without
            `none`.
    """

    scenes: Scenes
    rows: np.ndarray
    pairs: list[Parts]
    documents: dict[str, list[Parts]]

    @property
    def facts(self) -> list[Facts]:
        """The facts of each tested scene."""
        return [self.scenes.facts(int(row)) for row in self.rows]

    @property
    def levels(self) -> list[emoji_scenes.Level]:
        """The level of each tested scene."""
        return [self.scenes.levels[int(row)] for row in self.rows]

    @property
    def numbers(self) -> np.ndarray:
        """The picture of each tested scene, int64 [Q]."""
        return np.array([pair[1] for pair in self.pairs])

    def before(self, name: str) -> list[Parts]:
        """The parts before each scene; empty for `none`."""
        return [()] * len(self.pairs) if name == "none" else self.documents[name]

    def before_images(self, name: str) -> list[Parts]:
        """The same where captions are to be written: images first, retrieved by the scene's image."""
        return list(map(interleaved.images_first, self.before(FOR_CAPTIONS.get(name, name))))


def open_scenes(
    world: world_config.EmojiWorld,
    run: run_folder.Run,
    album: Album,
    split: str,
    count: int,
    seed: int,
) -> TestedScenes:
    """`count` test scenes of a split, of those that the stage `neighbors` has retrieved documents for.

    Args:
        world: world of the scenes, of whose documents the run's memory is made.
        run: the run.
        album: gets the pictures.
        split: held_out | seen.
        count: how many scenes at most.
        seed: of the choice of oracle and wrong documents.
    """
    scenes = world.scenes("test", *SPLITS[split])
    folder = run.finished_stage("neighbors")
    names = ("rows", "text", "image")
    rows, by_text, by_image = (files.read_array(folder / f"{split}_{name}.npy") for name in names)
    chosen = world_config.evenly_spaced(np.arange(len(rows)), count)
    rows, by_text, by_image = rows[chosen], by_text[chosen], by_image[chosen]
    rng = np.random.default_rng((seed, len(scenes)))
    memory = world.scenes("memory", *SPLITS[split])
    own = [np.flatnonzero(memory.class_ids == scenes.class_ids[row]) for row in rows]
    other = [np.flatnonzero(memory.class_ids != scenes.class_ids[row]) for row in rows]
    row_parts = functools.partial(training_documents.scene_row, album, memory)
    pick = lambda groups: [row_parts(int(rng.choice(group))) for group in groups]
    return TestedScenes(
        scenes,
        rows,
        [training_documents.scene_pair(album, scenes, int(row)) for row in rows],
        {
            "oracle": pick(own),
            "wrong": pick(other),
            "retrieved": _rows(world, album, by_text[:, 0]),
            "retrieved_by_image": _rows(world, album, by_image[:, 0]),
        },
    )


def _rows(world: world_config.EmojiWorld, album: Album, hits: np.ndarray) -> list[Parts]:
    """The parts of memory rows, which are those of seen classes and then of held-out ones; () for -1."""
    seen, held_out = (
        world.scenes("memory", *names) for names in (world_config.SEEN, world_config.HELD_OUT)
    )

    def parts(row: int) -> Parts:
        if row < 0:
            return ()
        source, at = (seen, row) if row < len(seen) else (held_out, row - len(seen))
        return training_documents.scene_row(album, source, at)

    return [parts(row) for row in hits.tolist()]


def random_candidates(tested: TestedScenes, count: int, rng: np.random.Generator) -> np.ndarray:
    """The picture of each scene, and those of `count` - 1 other tested ones: int [Q, count]."""
    numbers = tested.numbers
    count = min(count, len(numbers))
    others = [rng.permutation(np.delete(numbers, i))[: count - 1] for i in range(len(numbers))]
    return np.stack([np.r_[own, rest] for own, rest in zip(numbers, others, strict=True)])


def own_candidates(album: Album, tested: TestedScenes, class_share: float) -> np.ndarray:
    """The picture of each scene, and those of all other configurations of its class: int [Q, 32]."""

    def of(facts: Facts, level: emoji_scenes.Level, number: int) -> list[int]:
        class_id = facts.entities[0].class_id
        every = emoji_scenes.configurations(level, class_id, tested.scenes.seed, class_share)
        found = [training_documents.scene_number(album, each, level) for each in every]
        return [number, *(each for each in found if each != number)]

    triples = zip(tested.facts, tested.levels, tested.numbers.tolist(), strict=True)
    return np.array([of(*triple) for triple in triples])


def same_candidates(
    album: Album, tested: TestedScenes, count: int, rng: np.random.Generator
) -> np.ndarray:
    """The picture of each scene, and the same with other classes of the split as its first entity."""
    classes = np.unique(tested.scenes.class_ids)
    # As many for a pair, of which two classes are left out, as for a single entity.
    most = min(count - 1, len(classes) - max(len(facts.entities) for facts in tested.facts))

    def of(facts: Facts, level: emoji_scenes.Level, number: int) -> list[int]:
        own = [entity.class_id for entity in facts.entities]
        others = rng.permutation(classes[~np.isin(classes, own)])[:most]
        return [number, *(_with_class(album, facts, level, int(each)) for each in others)]

    triples = zip(tested.facts, tested.levels, tested.numbers.tolist(), strict=True)
    return np.array([of(*triple) for triple in triples])


def _with_class(album: Album, facts: Facts, level: emoji_scenes.Level, class_id: int) -> int:
    first = dataclasses.replace(facts.entities[0], class_id=class_id)
    changed = dataclasses.replace(facts, entities=(first, *facts.entities[1:]))
    return training_documents.scene_number(album, changed, level)


def joined(before: Sequence[Parts], main: Sequence[Parts]) -> list[Parts]:
    """Documents and what follows them, for each scene."""
    return [(*first, *rest) for first, rest in zip(before, main, strict=True)]
