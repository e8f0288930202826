"""Figures of an image tokenizer: logged while it is trained, and measured on test images afterwards."""

from collections.abc import Mapping, Sequence
from typing import Any

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
        `psnr` in dB; `code_usage` and `perplexity` of the codebook; with several levels the same of each one,
        and `latent_error`, the share of ||z||^2 that the codes up to a level leave, as `code_usage_level1`
        and so on.
    """
    by_level, errors = averages["code_frequencies"], averages["latent_errors"]
    metrics = {"psnr": objective.psnr(float(averages["squared_error"]))}
    metrics |= _code_figures(by_level.sum(axis=0))
    shares = errors / max(float(averages["latent_square"]), 1e-12)
    if len(by_level) > 1:
        for number, (frequencies, share) in enumerate(zip(by_level, shares, strict=True), 1):
            figures = _code_figures(frequencies) | {"latent_error": float(share)}
            metrics |= {f"{name}_level{number}": value for name, value in figures.items()}
    return metrics


def measure(
    world: world_config.EmojiWorld | world_config.OwnImages,
    tokenizer: frozen.FrozenTokenizer,
    num_eval: int,
    seed: int,
    further_sizes: Sequence[int] = (),
    splits: Sequence[str] = world_config.TEST,
) -> dict[str, Any]:
    """Figures on at most `num_eval` test images of the classes of some splits, chosen by `seed`.

    Returns:
        `psnr` in dB, `code_usage` in [0, 1], `perplexity`; with several levels, the same under `level1`,
        `level2` and so on, of the codes of one level, with `words`, the number of codes it uses, and `psnr`
        of images decoded from the levels up to it; `psnr` of each further image size under `size16` and so
        on; for emoji scenes, the scorer's accuracy on original and on reconstructed images.
    """
    held_out = world.scenes("test", *splits)
    rows = world_config.sample_rows(held_out, num_eval, seed)
    originals = world_config.images(held_out, rows)
    codes = tokenizer.encode(originals)
    metrics: dict[str, Any] = {"psnr": psnr(tokenizer, originals, codes)}
    metrics |= _code_figures(_frequencies(codes, tokenizer.codebook_size))
    metrics |= _level_figures(tokenizer, originals, codes)
    for size in further_sizes:
        resized = np.stack([image_files.fit(image, size) for image in originals])
        metrics[f"size{size}"] = {"psnr": psnr(tokenizer, resized, tokenizer.encode(resized))}
    if isinstance(held_out, emoji_scenes.Scenes):
        metrics["scorer_on_originals"] = _accuracy(held_out, rows, originals)
        metrics["scorer_ceiling"] = _accuracy(held_out, rows, tokenizer.decode(codes))
    return metrics


def psnr(
    tokenizer: frozen.FrozenTokenizer,
    originals: np.ndarray,
    codes: np.ndarray,
    num_levels: int | None = None,
) -> float:
    """PSNR in dB of images uint8 [B, H, W, 3] decoded from the first levels of their codes, None for all."""
    return objective.psnr(_squared_errors(tokenizer, originals, codes, num_levels).mean())


def psnr_of_each(
    tokenizer: frozen.FrozenTokenizer,
    originals: np.ndarray,
    codes: np.ndarray,
    num_levels: int | None = None,
) -> np.ndarray:
    """`psnr` of each image, float64 [B], at most that of an error of half a step of 8 bits everywhere."""
    errors = _squared_errors(tokenizer, originals, codes, num_levels)
    return -10 * np.log10(np.maximum(errors, (0.5 / 255) ** 2))


def _squared_errors(
    tokenizer: frozen.FrozenTokenizer,
    originals: np.ndarray,
    codes: np.ndarray,
    num_levels: int | None,
) -> np.ndarray:
    """Mean squared error of each image, float64 [B], of pixels in 0..1."""
    grids = tokenizer.grids_at(*originals.shape[1:3])
    decoded = tokenizer.decode(codes, num_levels, grids)
    return np.square((decoded.astype(np.float64) - originals) / 255).mean(axis=(1, 2, 3))


def _code_figures(frequencies: np.ndarray) -> dict[str, float]:
    """Usage and perplexity of the codebook, from how often each code is used."""
    return {
        "code_usage": float((frequencies > 0).mean()),
        "perplexity": float(quantize.perplexity(frequencies)),
    }


def _level_figures(
    tokenizer: frozen.FrozenTokenizer, originals: np.ndarray, codes: np.ndarray
) -> dict[str, Any]:
    """Figures of each level, {} if there is one; see `measure`."""
    if len(tokenizer.grids) == 1:
        return {}
    by_level = np.split(codes, code_grids.ends(tokenizer.grids)[:-1], axis=1)
    return {
        f"level{number}": {
            "psnr": psnr(tokenizer, originals, codes, number),
            "words": len(np.unique(level_codes)),
        }
        | _code_figures(_frequencies(level_codes, tokenizer.codebook_size))
        for number, level_codes in enumerate(by_level, 1)
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
