"""Structure of a scene: silhouettes and edges, drawn from its image, and its image drawn from them.

CM3Leon's structure-guided generation: an item gives a structure, then a caption without places.
"""

from collections.abc import Callable

import numpy as np

from rag_mm.core.document_types import Image, Text
from rag_mm.worlds.emoji import art, emoji_scenes, scene_tasks
from rag_mm.worlds.emoji.emoji_scenes import Facts, Level, Scenes
from rag_mm.worlds.emoji.scene_boxes import judge_drawn
from rag_mm.worlds.emoji.scene_tasks import SceneTask, Scores, TaskItem

# Of 0..255. At 32 every class has 13 pixels of edges or more on every color on which it is visible; at 44
# some have none.
EDGE_STEP = 32
_OPAQUE = 128


def silhouette(facts: Facts, level: Level) -> np.ndarray:
    """The entities in white on black, without their cards: uint8 [S, S, 3], S the side of the level's images.

    A pixel is white where the alpha of an entity is at least half.
    """
    white = np.zeros((level.image_size, level.image_size), bool)
    for e in facts.entities:
        inside = art.load_art().rgba(e.class_id, e.size)[..., 3] >= _OPAQUE
        white[e.row : e.row + e.size, e.column : e.column + e.size] |= inside
    return _black_and_white(white)


def edges(image: np.ndarray) -> np.ndarray:
    """The edges of an image, white on black: uint8 [S, S, 3] to uint8 [S, S, 3].

    A pixel is white if one of its channels differs by more than `EDGE_STEP` from that of its neighbor to the
    right or below. Integers are compared, so that the result is the same on every machine.
    """
    values = image.astype(np.int16)
    white = np.zeros(image.shape[:2], bool)
    white[:-1] |= np.abs(np.diff(values, axis=0)).max(-1) > EDGE_STEP
    white[:, :-1] |= np.abs(np.diff(values, axis=1)).max(-1) > EDGE_STEP
    return _black_and_white(white)


def edges_of_scene(facts: Facts, level: Level) -> np.ndarray:
    """The edges of a scene's image: uint8 [S, S, 3]."""
    return edges(emoji_scenes.render(facts, level))


def _black_and_white(white: np.ndarray) -> np.ndarray:
    return np.repeat(np.where(white, 255, 0).astype(np.uint8)[..., None], 3, axis=-1)


def caption_without_places(facts: Facts, rng: np.random.Generator) -> str:
    """Names the entities from top to bottom, then from left to right, and the color."""
    in_order = sorted(facts.entities, key=lambda entity: (entity.row, entity.column))
    names = " and ".join(scene_tasks.any_name(entity, rng) for entity in in_order)
    return f"{names} on a {facts.color} background"


def judge_structure(item: TaskItem, images: list[np.ndarray]) -> Scores:
    """Compares black and white, divided at the middle of the mean over channels, with the target.

    Keys: `iou`, the white pixels of both as a share of those of either; `equal`, the share of all pixels that
    are equal; `exact`, whether all are.
    """
    (wanted,) = scene_tasks.images_of(item.target)
    drawn, asked = (image.mean(-1) >= _OPAQUE for image in (images[0], wanted))
    iou = float((drawn & asked).sum() / max(1, (drawn | asked).sum()))
    return {
        "iou": iou,
        "equal": float((drawn == asked).mean()),
        "exact": bool((drawn == asked).all()),
    }


Structure = Callable[[Facts, Level], np.ndarray]
Make = Callable[[Scenes, int, np.random.Generator], TaskItem]


def _extract(structure: Structure, text: str) -> Make:
    """Makes items that ask for the structure of an image."""

    def make(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
        facts, level = scenes.facts(index), scenes.levels[index]
        prompt = (scene_tasks.picture(facts, level), Text(text))
        return TaskItem(level, facts, prompt, (Image(structure(facts, level)),), (facts,))

    return make


def _fill(structure: Structure, text: str) -> Make:
    """Makes items that ask for the image of a structure."""

    def make(scenes: Scenes, index: int, rng: np.random.Generator) -> TaskItem:
        facts, level = scenes.facts(index), scenes.levels[index]
        prompt = (
            Text(text),
            Image(structure(facts, level)),
            Text(caption_without_places(facts, rng)),
        )
        return TaskItem(level, facts, prompt, (scene_tasks.picture(facts, level),), (facts,))

    return make


_SCORE_STRUCTURE = scene_tasks.score_images(judge_structure)
_SCORE_DRAWN = scene_tasks.score_facts(judge_drawn)
SILHOUETTE = SceneTask("silhouette", _extract(silhouette, "draw the silhouette"), _SCORE_STRUCTURE)
EDGES = SceneTask("edges", _extract(edges_of_scene, "draw the edges"), _SCORE_STRUCTURE)
FROM_SILHOUETTE = SceneTask("from_silhouette", _fill(silhouette, "silhouette"), _SCORE_DRAWN)
FROM_EDGES = SceneTask("from_edges", _fill(edges_of_scene, "edges"), _SCORE_DRAWN)
