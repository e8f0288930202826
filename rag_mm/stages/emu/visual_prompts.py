"""What the visual decoder is measured on: the codes of test scenes, of stories and of blends."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rag_mm.data.interleaved import Parts
from rag_mm.eval import scene_accuracy
from rag_mm.stages.emu import training_documents
from rag_mm.stages.emu.rollout_figures import Values
from rag_mm.stages.emu.tested_scenes import EncodedPictures
from rag_mm.worlds.emoji import scene_facts
from rag_mm.worlds.emoji.emoji_scenes import Facts, Level, Scenes

# Of a story: its first caption, its first image, and the sentence about the second image.
_NUM_GIVEN = 3
STORY, SENTENCE, FIRST_IMAGE = "story", "sentence", "first_image"


@dataclasses.dataclass(frozen=True, eq=False)
class WantedImages:
    """Images that are to be drawn.

    Attributes:
        pixels: uint8 [Q, H, W, 3].
        facts: of each.
        levels: of each.
    """

    pixels: np.ndarray
    facts: Sequence[Facts]
    levels: Sequence[Level]

    def judge(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """Figures of uint8 [Q, H, W, 3], float64 [Q] each.

        `mse` is the mean squared error of pixels in 0..1; `entity`, `place`, `color` and `joint` are 1 where
        the scorer reads the wanted one.
        """
        errors = np.square((drawn.astype(np.float64) - self.pixels) / 255).mean((1, 2, 3))
        read = scene_facts.read(drawn, self.levels)
        outcomes = scene_accuracy.outcomes(read, self.facts, self.levels[0])
        return {"mse": errors} | {fact: hits.astype(float) for fact, hits in outcomes.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class StoryPrompts:
    """Stories of test scenes up to their second image.

    Attributes:
        given: caption, first image and the sentence about the second, of each.
        first: numbers of the first images, int64 [Q].
        second: those of the second ones, which are wanted.
        wanted: the second images.
    """

    given: list[Parts]
    first: np.ndarray
    second: np.ndarray
    wanted: WantedImages

    def prompts(self) -> dict[str, list[Parts]]:
        """All that is given of each story; or only the sentence, without the image that it is about."""
        return {STORY: self.given, SENTENCE: [parts[-1:] for parts in self.given]}


def open_stories(pictures: EncodedPictures, scenes: Scenes, rows: Sequence[int]) -> StoryPrompts:
    """One story of each scene; facts of its second image are read from the original's pixels."""
    album = pictures.album
    stories = [training_documents.scene_story(album, scenes, row) for row in rows]
    first, second = (np.array([parts[at] for parts in stories]) for at in (1, _NUM_GIVEN))
    pixels, levels = pictures.pixels(second), [scenes.levels[row] for row in rows]
    wanted = WantedImages(pixels, scene_facts.read(pixels, levels), levels)
    return StoryPrompts([parts[:_NUM_GIVEN] for parts in stories], first, second, wanted)


def blends(numbers: np.ndarray) -> list[Parts]:
    """Each image and the one after it, the last with the first, without a text."""
    return list(zip(numbers.tolist(), np.roll(numbers, -1).tolist(), strict=True))


def judge_all(wanted: WantedImages, drawn: dict[str, np.ndarray]) -> Values:
    """The figures of each variant's images."""
    return {name: wanted.judge(images) for name, images in drawn.items()}
