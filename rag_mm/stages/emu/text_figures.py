"""Figures of texts that Emu writes or scores: captions, stories, and the direction of a clip's motion."""

import itertools
import re
from collections.abc import Sequence

import numpy as np

from rag_mm.data import interleaved
from rag_mm.data.interleaved import Parts
from rag_mm.stages.emu import tested_scenes, training_documents
from rag_mm.stages.emu.rollout_figures import Values
from rag_mm.stages.emu.tested_scenes import DOCUMENTS, EncodedPictures, TestedScenes
from rag_mm.worlds.emoji import emoji_scenes, scene_clips, scene_tasks
from rag_mm.worlds.emoji.emoji_scenes import COLUMNS, ROWS, Facts, Level, Scenes

_PLACES = "|".join(
    sorted(
        {" ".join(filter(None, each)) for each in itertools.product(ROWS, COLUMNS)} - {""}
        | {"center"},
        key=len,
        reverse=True,
    )
)
_ENTITY = rf"(?:little )?(.+?) (?:at|near) the ({_PLACES})"
_LENGTHS = 8
# The clips whose frames are in their order, and the control.
IN_ORDER, SHUFFLED = "in_order", "shuffled_frames"


def caption(pictures: EncodedPictures, tested: TestedScenes) -> dict[str, list[str]]:
    """What is written after each scene's image, by the documents before it, images first."""
    longest = max(len(pictures.emu.maker.text(str(pair[0]))) for pair in tested.pairs)
    # The end of the sequence is a token, too, and a wrong caption may be longer. One of few numbers, so that
    # splits have one program; after the end nothing is computed.
    most = longest + 4 + -(longest + 4) % _LENGTHS
    images: list[Parts] = [pair[1:] for pair in tested.pairs]
    vectors, written = pictures.vectors, {}
    for name in DOCUMENTS:
        prompts = tested_scenes.joined(tested.before_images(name), images)
        written[name] = pictures.emu.write(prompts, vectors, most)
    return written


def measure_captions(
    pictures: EncodedPictures, tested: TestedScenes, written: dict[str, list[str]]
) -> Values:
    """By documents: `exact`, `named`, `place` and `color` of the captions, and `caption_nll` of the full one.

    A caption of another form has neither name, place nor color.
    """
    wanted = [str(pair[0]) for pair in tested.pairs]
    scenes = list(zip(tested.facts, tested.levels, wanted, strict=True))
    mains = [interleaved.images_first(pair) for pair in tested.pairs]
    values: Values = {}
    for name, texts in written.items():
        judged = [judge(text, *scene) for text, scene in zip(texts, scenes, strict=True)]
        nll = pictures.emu.text_nll(tested.before_images(name), mains, pictures.vectors)
        values[name] = {
            figure: np.array([each[figure] for each in judged], float) for figure in judged[0]
        } | {"caption_nll": nll}
    return values


def judge(text: str, facts: Facts, level: Level, wanted: str) -> dict[str, bool]:
    """Which parts of a caption of a scene are right: the names and the places of all its entities."""
    pattern = " and ".join([_ENTITY] * len(facts.entities)) + r" on a (\w+) background"
    found = re.fullmatch(pattern, text)
    *said, color = found.groups() if found else ("", "") * len(facts.entities) + ("",)
    classes = [entity.class_id for entity in facts.entities]
    places = [emoji_scenes.place(entity, level) for entity in facts.entities]
    return {
        "exact": text == wanted,
        "named": [scene_tasks.class_of_name(name) for name in said[::2]] == classes,
        "place": said[1::2] == places,
        "color": color == facts.color,
    }


def measure_stories(pictures: EncodedPictures, scenes: Scenes, rows: Sequence[int]) -> Values:
    """`story_nll` of the sentences of one story of each scene, each after all before it."""
    album = pictures.album
    stories = [training_documents.scene_story(album, scenes, row) for row in rows]
    nll = pictures.emu.text_nll([()] * len(stories), stories, pictures.vectors)
    return {"story": {"story_nll": nll}}


def measure_motion(
    pictures: EncodedPictures, scenes: Scenes, rows: Sequence[int], rng: np.random.Generator
) -> Values:
    """`direction`: whether the right one of four captions is the likeliest after a clip of each scene.

    The captions differ in the direction alone. The variant `shuffled_frames` has the same frames in another
    order.
    """
    clips = [training_documents.scene_clip(pictures.album, scenes, row) for row in rows]
    mixed = [(clip[0], *(clip[1 + i] for i in _other_order(len(clip) - 1, rng))) for clip in clips]
    return {
        name: {"direction": _direction(pictures, made)}
        for name, made in ((IN_ORDER, clips), (SHUFFLED, mixed))
    }


def _other_order(count: int, rng: np.random.Generator) -> np.ndarray:
    """A permutation that is neither the order nor its reverse."""
    while True:
        order = rng.permutation(count)
        if (np.diff(order) != 1).any() and (np.diff(order) != -1).any():
            return order


def _direction(pictures: EncodedPictures, clips: Sequence[Parts]) -> np.ndarray:
    directions, pattern = tuple(scene_clips.DIRECTIONS), r"moving \w+ on"
    mains = [
        interleaved.images_first((re.sub(pattern, f"moving {each} on", str(clip[0])), *clip[1:]))
        for clip in clips
        for each in directions
    ]
    nll = pictures.emu.text_nll([()] * len(mains), mains, pictures.vectors)
    best = nll.reshape(len(clips), -1).argmin(1)
    return np.array(
        [f"moving {directions[i]} on" in str(clip[0]) for i, clip in zip(best, clips, strict=True)],
        float,
    )
