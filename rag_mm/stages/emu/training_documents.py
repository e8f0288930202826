"""The documents that Emu trains on, as texts and numbers of pictures, and the album of these pictures."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from rag_mm.core import caption_text, image_files, run_folder
from rag_mm.core.document_types import Document
from rag_mm.core.errors import UserError
from rag_mm.data import interleaved, open_documents
from rag_mm.data.interleaved import Part, Parts
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages.emu.album import Album
from rag_mm.stages.shared import build_memory, world_config
from rag_mm.worlds.emoji import emoji_scenes, scene_clips, scene_stories, scene_tasks
from rag_mm.worlds.emoji.emoji_scenes import Facts, Level, Scenes

STORIES, CLIPS = "Emu story", "Emu clip"  # Purposes of random streams.


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingDocuments:
    """What sequences are made of; pictures are numbers in the album.

    Attributes:
        album: all pictures.
        pairs: caption and picture of each training document of the world.
        memory: each row of the memory without held-out classes; empty without a memory.
        stories: texts and pictures in turn.
        clips: a caption, then 8 frames.
        documents: further documents of any parts.
    """

    album: Album
    pairs: list[Parts]
    memory: list[Parts]
    stories: list[Parts]
    clips: list[Parts]
    documents: list[Parts]

    @property
    def texts(self) -> Iterator[str]:
        """All texts, for a text tokenizer."""
        groups = (self.pairs, self.memory, self.stories, self.clips, self.documents)
        return (part for group in groups for parts in group for part in parts if type(part) is str)


def scene_number(album: Album, facts: Facts, level: Level) -> int:
    """The number of a scene's picture."""
    return album.add((level.name, facts), functools.partial(emoji_scenes.render, facts, level))


def collect(
    world: world_config.EmojiWorld | world_config.OwnImages,
    run: run_folder.Run,
    num_stories: int,
    num_clips: int,
    documents: str | None,
) -> TrainingDocuments:
    """Everything to train on, the same for the same arguments.

    Args:
        world: its training documents of seen classes become pairs; of emoji scenes also stories and clips.
        run: whose memory is read, if it has one.
        num_stories: stories of scenes of seen classes; no picture is that of a test scene.
        num_clips: clips of them, likewise.
        documents: of any segments, as for `--documents`; None for none.

    Raises:
        UserError: the documents cannot be read, or the memory is unfinished or edited.
    """
    album, source = Album(), world.scenes("train", *world_config.SEEN)
    stories, clips = [], []
    if isinstance(source, Scenes):
        pairs = [scene_pair(album, source, i) for i in range(len(source))]
        test = world.scenes("test", *world_config.SEEN)
        assert isinstance(test, Scenes)
        tested = {test.facts(i) for i in range(len(test))}
        chosen = _spread(len(source), num_stories)
        stories = [_training_story(album, source, i, tested) for i in chosen]
        clips = [_training_clip(album, source, i, tested) for i in _spread(len(source), num_clips)]
    else:
        pairs = [_own_pair(album, source, i) for i in range(len(source))]
    memory = list(_memory_rows(album, world, run)) if run.manifest("memory") is not None else []
    further = list(_read(album, documents, world.image_size)) if documents else []
    return TrainingDocuments(album, pairs, memory, stories, clips, further)


def scene_pair(album: Album, scenes: Scenes, index: int) -> Parts:
    """The full caption of a scene and its picture."""
    picture = scene_number(album, scenes.facts(index), scenes.levels[index])
    return scenes.full_caption(index), picture


def scene_row(album: Album, scenes: Scenes, index: int) -> Parts:
    """What a memory holds of a scene: its first caption and its picture."""
    picture = scene_number(album, scenes.facts(index), scenes.levels[index])
    return caption_text.clean(scenes.caption(index, 0)), picture


def scene_story(album: Album, scenes: Scenes, index: int, attempt: int = 0) -> Parts:
    """A scene's caption and picture, then what changes and the new picture, one to three times."""
    level = scenes.levels[index]
    story = _sample_story(scenes, index, attempt)
    parts: list[Part] = [scenes.full_caption(index), scene_number(album, story[0], level)]
    for before, after in itertools.pairwise(story):
        parts += [
            scene_stories.tell_step(before, after, level),
            scene_number(album, after, level),
        ]
    return tuple(parts)


def scene_clip(album: Album, scenes: Scenes, index: int, attempt: int = 0) -> Parts:
    """The caption of a clip of the scene's first entity, and its 8 frames."""
    level, frames = scenes.levels[index], _sample_clip(scenes, index, attempt)
    name = scene_tasks.first_name(frames[0].entities[0])
    return scene_clips.clip_caption(name, frames), *(
        scene_number(album, frame, level) for frame in frames
    )


def memory_parts(album: Album, memory: Memory, row: int) -> Parts:
    """The parts of any memory's row; its pictures are numbered by row."""
    return interleaved.parts_of(
        memory.document(row),
        lambda i, pixels: album.add(
            (memory.fingerprint, row, i), lambda: memory.document(row).pictures[i]
        ),
    )


def _sample_story(scenes: Scenes, index: int, attempt: int) -> tuple[Facts, ...]:
    rng = _rng(STORIES, scenes, index, attempt)
    return scene_stories.sample_story(scenes.facts(index), scenes.levels[index], rng)


def _sample_clip(scenes: Scenes, index: int, attempt: int) -> tuple[Facts, ...]:
    rng = _rng(CLIPS, scenes, index, attempt)
    return scene_clips.sample_clip(scenes.facts(index), scenes.levels[index], rng)


def _training_story(album: Album, scenes: Scenes, index: int, tested: set[Facts]) -> Parts:
    """A story whose pictures are none of the `tested` scenes."""
    attempt = next(i for i in range(1000) if not tested & {*_sample_story(scenes, index, i)})
    return scene_story(album, scenes, index, attempt)


def _training_clip(album: Album, scenes: Scenes, index: int, tested: set[Facts]) -> Parts:
    """A clip whose frames are none of the `tested` scenes; it starts or ends at the place of a scene."""
    attempt = next(i for i in range(1000) if not tested & {*_sample_clip(scenes, index, i)})
    return scene_clip(album, scenes, index, attempt)


def _rng(purpose: str, scenes: Scenes, index: int, attempt: int) -> np.random.Generator:
    return emoji_scenes.make_rng(f"{purpose} of {scenes.scene_id(index)}", scenes.seed, attempt)


def _spread(total: int, count: int) -> list[int]:
    """`count` of `total` numbers, at equal distances; all of them if there are fewer."""
    return world_config.evenly_spaced(np.arange(total), count).tolist()


def _own_pair(album: Album, source: world_config.SplitDocuments, index: int) -> Parts:
    number = album.add((source[index].id, 0), functools.partial(source.image, index))
    return source.full_caption(index), number


def _memory_rows(
    album: Album,
    world: world_config.EmojiWorld | world_config.OwnImages,
    run: run_folder.Run,
) -> Iterator[Parts]:
    """The rows that training may read: those of seen classes."""
    memory = build_memory.open_memory(run, build_memory.SEEN_VERSION)
    if build_memory.is_given(run) or not isinstance(world, world_config.EmojiWorld):
        yield from (memory_parts(album, memory, row) for row in range(len(memory)))
        return
    # The same pictures as the world's, so that each has one number.
    source = world.scenes("memory", *world_config.SEEN)
    for row in range(len(memory)):
        yield scene_row(album, source, row)


def _read(album: Album, documents: str, image_size: int) -> Iterator[Parts]:
    """The good records of a source, with their pictures kept in RAM at the models' size."""
    source, bad, count = open_documents.open_documents(documents), "", 0
    for item in source.read(0):
        if item.document is None:
            if item.reject is not None and not bad:
                bad = f"; the first bad one is {item.reject.name}: {item.reject.detail}"
            continue
        count += 1
        yield _parts_in_ram(album, item.document, count, image_size)
    if not count:
        raise UserError(f"{documents} has no good record{bad}.")


def _parts_in_ram(album: Album, document: Document, place: int, image_size: int) -> Parts:
    # By place: two documents may have one id.
    def number(i: int, pixels: np.ndarray) -> int:
        fitted = image_files.fit(pixels, image_size)
        return album.add(("documents", place, i), lambda: fitted)

    return interleaved.parts_of(document, number)
