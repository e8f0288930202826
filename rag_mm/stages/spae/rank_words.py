"""Stage `word_pools`: embeds every training image, and ranks the words that fit it (docs/papers/spae.md).

Images are embedded by the run's frozen retriever; words have the features of the language codebook.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from etils import epath

from rag_mm.core import checks, files, progress, run_folder
from rag_mm.core.errors import UserError
from rag_mm.models.spae import semantic
from rag_mm.stages.shared import train_retriever, world_config
from rag_mm.stages.spae import build_codebook, word_features

INPUTS = ("retriever", "language_codebook")
EMBEDDINGS, POOL_WORDS, POOL_SIZES = "embeddings.npy", "pool_words.npy", "pool_sizes.npy"
_PARTS = "parts"  # Folder of finished chunks, which is gone in the end.
_MAX_IMAGES, _MAX_SCORES = 1024, 2**24  # Of a chunk; the scores are 64 MiB.


@dataclasses.dataclass(frozen=True)
class WordPoolsStageConfig:
    """Which words are in the pool of an image at each level.

    Attributes:
        seed: seed of the run; unused.
        world: world of the images.
        features: all_names | seen_names | templates, the features of the words.
        thresholds: least relative score of the words of each level's pool, coarse to fine; further levels
            have no pools. Not rising with depth. The paper's are .98 .95 .90 .85 .80 for its levels 1 to 5.
        max_words: largest pool; words of lower scores are left out of a larger one.
    """

    seed: int
    world: world_config.EmojiWorld | world_config.OwnImages
    features: str = "all_names"
    thresholds: tuple[float, ...] = (0.98, 0.95, 0.90)
    max_words: int = 64

    def __post_init__(self):
        checks.one_of(self, "features", word_features.KINDS)
        checks.at_least(self, 1, "max_words")
        falling = sorted(self.thresholds, reverse=True)
        if not self.thresholds or list(self.thresholds) != falling or not 0 <= min(falling) <= 1:
            raise ValueError(
                f"thresholds are {self.thresholds}; give at least one, in 0 to 1, not rising with depth"
            )


class WordPools(NamedTuple):
    """The pools of R training images, in the order of the world's training documents.

    Attributes:
        embeddings: of the images in the retriever, float32 [R, E].
        words: each image's words by falling relative score, int32 [R, M].
        sizes: how many of them are in the pool of each level, int32 [R, L], at least 1.
    """

    embeddings: np.ndarray
    words: np.ndarray
    sizes: np.ndarray


def run(config: WordPoolsStageConfig, run: run_folder.Run, stage_dir: epath.Path) -> dict:
    """Writes embeddings and pools; chunks of images are kept until all are done, so that it resumes.

    Returns:
        `median_size`, by level; `capped`, the share of images with a pool larger than `max_words`.
    """
    source = config.world.scenes("train", *world_config.SEEN)
    encoder = train_retriever.load_encoder(run.workdir)
    codebook = build_codebook.load(run.finished_stage("language_codebook"))
    features = _features(config, codebook)
    parts, size = [], max(1, min(_MAX_IMAGES, _MAX_SCORES // len(features)))
    with progress.track("word_pools", len(source)) as bar:
        for first in range(0, len(source), size):
            rows = np.arange(first, min(first + size, len(source)))
            folder = stage_dir / _PARTS / f"{first:09d}"
            # The sizes are written last.
            if not (folder / POOL_SIZES).exists():
                embeddings = encoder.encode_image(world_config.images(source, rows))
                _save(folder, _rank(embeddings, features, config))
            parts.append(load(folder))
            bar.update(rows[-1] + 1)
    whole = WordPools(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    sizes = np.minimum(whole.sizes, whole.words.shape[1])
    # No image has more words than the largest pool.
    _save(stage_dir, WordPools(whole.embeddings, whole.words[:, : sizes.max()], sizes))
    files.discard(stage_dir / _PARTS)
    medians = {f"level{i}": float(np.median(each)) for i, each in enumerate(sizes.T, 1)}
    is_capped = whole.sizes.max(axis=1) > config.max_words
    return {"median_size": medians, "capped": float(is_capped.mean())}


def _rank(embeddings: np.ndarray, features: np.ndarray, config: WordPoolsStageConfig) -> WordPools:
    """The best words of images, and the sizes of their pools before they are cut to `max_words`."""
    scores = semantic.relative_scores(embeddings, features)
    sizes = np.stack([(scores >= low).sum(axis=1) for low in config.thresholds], axis=1)
    width = min(config.max_words, scores.shape[1])
    # Sorted, so that of equal scores the first word comes first.
    best = np.sort(np.argpartition(-scores, width - 1, axis=1)[:, :width], axis=1)
    order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
    return WordPools(embeddings, np.take_along_axis(best, order, axis=1), sizes)


def _save(folder: epath.Path, pools: WordPools) -> None:
    files.write_array(folder / EMBEDDINGS, pools.embeddings.astype(np.float32))
    files.write_array(folder / POOL_WORDS, pools.words.astype(np.int32))
    files.write_array(folder / POOL_SIZES, pools.sizes.astype(np.int32))


def _features(
    config: WordPoolsStageConfig, codebook: build_codebook.LanguageCodebook
) -> np.ndarray:
    if config.features not in codebook.features:
        raise UserError(
            "The words of the language codebook have no features; set "
            f"language_codebook.features={config.features}."
        )
    features = codebook.features[config.features]
    if not features.any():
        raise UserError(
            f"No word of the language codebook has features from {config.features}, since none is in a name; "
            "set word_pools.features=templates, or prefer_names with another language model."
        )
    return features


def load(folder: epath.Path) -> WordPools:
    """Reads what `run` wrote in the stage's folder."""
    return WordPools(*(files.read_array(folder / n) for n in (EMBEDDINGS, POOL_WORDS, POOL_SIZES)))
