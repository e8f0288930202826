"""Figures of an image tokenizer: logged while it is trained, and measured on test images afterwards."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rag_mm.core import code_grids, image_files
from rag_mm.eval import scene_accuracy
from rag_mm.models.spae import objective
from rag_mm.ops import quantize
from rag_mm.stages.shared import frozen, world_config
from rag_mm.worlds.emoji import emoji_scenes, scene_facts


def derive(averages: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Figures of a log line, from the averages of `objective.loss_fn`'s metrics.

    Returns:
        `psnr` in dB; `code_usage` and `perplexity` of the codebook; with several levels the same of each one
        as `code_usage_level1` and so on, `latent_error`, the share of ||z||^2 that the codes up to a level
        leave, and `latent_norm`, the length of the vectors that a level quantizes, by root mean squares, over
        that of the codebook's.
    """
    by_level, errors = averages["code_frequencies"], averages["latent_errors"]
    metrics = {"psnr": objective.psnr(float(averages["squared_error"]))}
    metrics |= _code_figures(by_level.sum(axis=0))
    shares = errors / max(float(averages["latent_square"]), 1e-12)
    norms = np.sqrt(averages["target_squares"] / max(float(averages["codebook_square"]), 1e-12))
    if len(by_level) > 1:
        for number, (frequencies, share, norm) in enumerate(
            zip(by_level, shares, norms, strict=True), 1
        ):
            figures = _code_figures(frequencies)
            figures |= {"latent_error": float(share), "latent_norm": float(norm)}
            metrics |= {f"{name}_level{number}": value for name, value in figures.items()}
    return metrics


class TestImages(NamedTuple):
    """Test images and what an image tokenizer makes of them.

    Attributes:
        source: the documents.
        rows: which of them, int64 [Q].
        images: uint8 [Q, H, W, 3].
        codes: int32 [Q, N].
        errors: mean squared error of pixels in 0..1 of each image decoded from the levels up to each one,
            float64 [levels, Q].
        decoded: from all levels, uint8 [Q, H, W, 3].
    """

    source: world_config.SplitDocuments
    rows: np.ndarray
    images: np.ndarray
    codes: np.ndarray
    errors: np.ndarray
    decoded: np.ndarray

    @property
    def psnr(self) -> np.ndarray:
        """PSNR in dB, float64 [levels, Q], at most that of an error of half a step of 8 bits everywhere."""
        return -10 * np.log10(np.maximum(self.errors, (0.5 / 255) ** 2))

    @property
    def sharpness(self) -> np.ndarray:
        """Mean difference of neighboring pixels, as a multiple of the originals' over all, float64 [Q].

        1 on average means that edges and textures are as strong as in the originals, not that they are right.
        """
        return _contrast(self.decoded) / max(_contrast(self.images).mean(), 1e-12)


def reconstruct(
    world: world_config.EmojiWorld | world_config.OwnImages,
    tokenizer: frozen.FrozenTokenizer,
    num_eval: int,
    seed: int,
    splits: Sequence[str] = world_config.TEST,
) -> TestImages:
    """Encodes and decodes at most `num_eval` test images of the classes of some splits, chosen by `seed`."""
    source = world.scenes("test", *splits)
    rows = world_config.sample_rows(source, num_eval, seed)
    images = world_config.images(source, rows)
    codes, errors = tokenizer.encode(images), []
    for number in range(1, len(tokenizer.grids) + 1):
        decoded = tokenizer.decode(codes, number)
        errors.append(_squared_errors(images, decoded))
    return TestImages(source, rows, images, codes, np.stack(errors), decoded)


def measure(
    tokenizer: frozen.FrozenTokenizer, test: TestImages, further_sizes: Sequence[int] = ()
) -> dict[str, Any]:
    """Figures of an image tokenizer on test images.

    Returns:
        `psnr` in dB, `sharpness`, `code_usage` in [0, 1], `perplexity`; with several levels, usage and
        perplexity under `level1`, `level2` and so on, of the codes of one level, with `words`, the number of
        codes it uses, and `psnr` of images decoded from the levels up to it; `psnr` of each further image
        size under `size16` and so on; for emoji scenes, the scorer's accuracy on original and on
        reconstructed images.
    """
    metrics: dict[str, Any] = {"psnr": objective.psnr(test.errors[-1].mean())}
    metrics["sharpness"] = float(test.sharpness.mean())
    metrics |= _code_figures(_frequencies(test.codes, tokenizer.codebook_size))
    metrics |= _level_figures(tokenizer, test)
    for size in further_sizes:
        resized = np.stack([image_files.fit(image, size) for image in test.images])
        grids = tokenizer.grids_at(size, size)
        decoded = tokenizer.decode(tokenizer.encode(resized), grids=grids)
        error = _squared_errors(resized, decoded).mean()
        metrics[f"size{size}"] = {"psnr": objective.psnr(error)}
    if isinstance(test.source, emoji_scenes.Scenes):
        metrics["scorer_on_originals"] = _accuracy(test.source, test.rows, test.images)
        metrics["scorer_ceiling"] = _accuracy(test.source, test.rows, test.decoded)
    return metrics


def _squared_errors(originals: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Mean squared error of each image, float64 [B], of pixels in 0..1."""
    return np.square((decoded.astype(np.float64) - originals) / 255).mean(axis=(1, 2, 3))


def _contrast(images: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighboring pixels of each uint8 image [B, H, W, 3], float64 [B]."""
    values = images.astype(np.float64)
    steps = [np.abs(np.diff(values, axis=axis)).mean(axis=(1, 2, 3)) for axis in (1, 2)]
    return (steps[0] + steps[1]) / 2


def _code_figures(frequencies: np.ndarray) -> dict[str, float]:
    """Usage and perplexity of the codebook, from how often each code is used."""
    return {
        "code_usage": float((frequencies > 0).mean()),
        "perplexity": float(quantize.perplexity(frequencies)),
    }


def _level_figures(tokenizer: frozen.FrozenTokenizer, test: TestImages) -> dict[str, Any]:
    """Figures of each level, {} if there is one; see `measure`."""
    if len(tokenizer.grids) == 1:
        return {}
    by_level = np.split(test.codes, code_grids.ends(tokenizer.grids)[:-1], axis=1)
    return {
        f"level{number}": {
            "psnr": objective.psnr(errors.mean()),
            "words": len(np.unique(codes)),
        }
        | _code_figures(_frequencies(codes, tokenizer.codebook_size))
        for number, (codes, errors) in enumerate(zip(by_level, test.errors, strict=True), 1)
    }


def _frequencies(codes: np.ndarray, codebook_size: int) -> np.ndarray:
    return np.bincount(codes.ravel(), minlength=codebook_size) / codes.size


def _accuracy(source: emoji_scenes.Scenes, rows: np.ndarray, images: np.ndarray) -> dict:
    """The scorer's accuracies on images of the scenes `rows`."""
    levels = [source.levels[row] for row in rows]
    facts = [source.facts(int(row)) for row in rows]
    outcomes = scene_accuracy.outcomes(scene_facts.read(images, levels), facts, levels[0])
    return {
        name.removesuffix("_accuracy"): value
        for name, value in scene_accuracy.accuracies(outcomes).items()
    }
