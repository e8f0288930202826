"""Figures of predicted images: variance explained, the right image found, what a linear map reads."""

import dataclasses

import numpy as np

from rag_mm.data.interleaved import Parts
from rag_mm.eval import image_vectors, scene_accuracy
from rag_mm.stages.emu import tested_scenes
from rag_mm.stages.emu.tested_scenes import DOCUMENTS, EncodedPictures, TestedScenes
from rag_mm.worlds.emoji import scene_facts

Values = dict[str, dict[str, np.ndarray]]  # By variant and figure, one value per scene.
SHUFFLED, ENCODED = "shuffled", "encoded"


@dataclasses.dataclass(frozen=True, eq=False)
class ImageCandidates:
    """Images among which a scene's own is to be found, numbers int [Q, C], its own first.

    Attributes:
        random: those of other tested scenes.
        own: all scenes of its class.
        same: the same places and color with other classes.
    """

    random: np.ndarray
    own: np.ndarray
    same: np.ndarray


def roll_out(pictures: EncodedPictures, tested: TestedScenes) -> dict[str, np.ndarray]:
    """The codes float32 [Q, N, R] of the image that follows each scene's full caption, by documents."""
    captions: list[Parts] = [pair[:1] for pair in tested.pairs]
    vectors = pictures.vectors
    return {
        name: pictures.emu.roll_out(tested_scenes.joined(tested.before(name), captions), vectors)
        for name in DOCUMENTS
    }


def measure(
    pictures: EncodedPictures,
    tested: TestedScenes,
    rolled: dict[str, np.ndarray],
    candidates: ImageCandidates,
    rng: np.random.Generator,
) -> Values:
    """By documents: `r2`, `random`, `own` and `same`, the last three whether the scene's image is nearest.

    The variant `shuffled` has the rollouts of other scenes' captions, without documents.
    """
    codes = pictures.codes
    wanted = codes[tested.numbers]
    between = image_vectors.variance(wanted)
    # Another scene's caption for every scene.
    rolled = rolled | {SHUFFLED: np.roll(rolled["none"], int(rng.integers(1, len(wanted))), axis=0)}
    return {
        name: {"r2": image_vectors.explained(made, wanted, between)}
        | {
            figure: image_vectors.is_nearest(made, codes, among).astype(float)
            for figure, among in vars(candidates).items()
        }
        for name, made in rolled.items()
    }


def read(
    pictures: EncodedPictures,
    tested: TestedScenes,
    rolled: dict[str, np.ndarray],
    readout: image_vectors.LinearReadout,
) -> Values:
    """The facts that the scorer finds in pictures of a linear readout: `read_entity` and so on.

    The variant `encoded` has the codes of the scenes' own images. `read_error` is the mean squared error of
    the pixels, which are in 0..1.
    """
    pixels = pictures.pixels(tested.numbers)
    values: Values = {}
    for name, codes in {ENCODED: pictures.codes[tested.numbers], **rolled}.items():
        images = readout.images(codes, pixels.shape[1:])
        facts = scene_facts.read(images, tested.levels)
        outcomes = scene_accuracy.outcomes(facts, tested.facts, tested.levels[0])
        errors = np.square((images.astype(np.float64) - pixels) / 255).mean((1, 2, 3))
        values[name] = {f"read_{fact}": hits.astype(float) for fact, hits in outcomes.items()}
        values[name]["read_error"] = errors
    return values
