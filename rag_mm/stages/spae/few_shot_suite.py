"""Suite `fewshot`: few-shot classification of images written as words, with and without an LM (SPAE)."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import code_grids, image_files, progress
from rag_mm.core.errors import UserError
from rag_mm.data import labeled
from rag_mm.eval import few_shot_episodes, statistics
from rag_mm.eval.few_shot_episodes import AskConfig, EpisodeConfig
from rag_mm.frozen_lm.lm_protocol import FrozenLM
from rag_mm.frozen_lm.word_text import WordTable, one_token_share
from rag_mm.stages.spae import word_images

_BATCH_SIZE = 64
_EPISODES, _ASK = EpisodeConfig(), AskConfig()


@dataclasses.dataclass(frozen=True)
class WordsConfig:
    """Which words stand for an image.

    Attributes:
        levels: the words of the first few levels, None for two, or one where there is one.
        top: instead, so many words of the best relative score, best first.
    """

    levels: int | None = None
    top: int | None = None

    def __post_init__(self):
        for name in ("levels", "top"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; give at least 1.")
        if self.levels is not None and self.top is not None:
            raise UserError("Give either levels or top words, not both.")


def evaluate(
    workdir: epath.PathLike,
    images: labeled.Labeled,
    *,
    against: epath.PathLike | None = None,
    lm: FrozenLM | None = None,
    words: WordsConfig = WordsConfig(),
    episodes: EpisodeConfig = _EPISODES,
    ask: AskConfig = _ASK,
) -> dict[str, Any]:
    """Classifies images by their words from a few examples per class.

    Args:
        workdir: run whose image tokenizer writes words.
        images: images and their classes.
        against: another run, by whose words the same images are classified in the same episodes.
        lm: a frozen language model; without one, equal words are counted.
        words: which words stand for an image.
        episodes: which episodes are drawn.
        ask: how the language model is asked.

    Returns:
        `accuracy` with `ci95`, `n` (episodes) and `standard_error`, of the calibrated language model, of the
        greedy one if only that was asked, or of the word overlap without one; the same under each of
        `overlap`, `log_p`, `calibrated`, `greedy` that was measured; `over_overlap`, the paired difference
        with the word overlap; `one_token_words`, the share of the run's words that are one token of the
        language model, None if it does not tell; with another run `over_against`, the paired difference
        with it by method; `method`, `chance`, `words` per image, `classes`, `rejected` (file and reason of
        each bad image) and `per_episode` (accuracies by method).

    Raises:
        UserError: the run has no words, none is a token of the language model, no image could be read, or
            there are too few classes or images per class.
    """
    opened = word_images.load(workdir)
    of_lm = {} if lm is None else {"one_token_words": one_token_share(opened.words, lm)}
    bags, class_ids = read_bags(opened, images, words)
    others: list[tuple[str, ...]] = []
    if against is not None:
        others, _ = read_bags(word_images.load(against), images, words)
    drawn = few_shot_episodes.draw_episodes(class_ids, episodes)

    def measure(
        bags: list[tuple[str, ...]], other: list[tuple[str, ...]], name: str
    ) -> dict[str, np.ndarray]:
        avoided = [other] if other else []
        with progress.track(name, len(drawn)) as bar:
            return few_shot_episodes.measure(
                drawn, bags, images.class_names, lm, ask, avoided, on_episode=bar.update
            )

    found = measure(bags, others, "episodes")
    summaries = {
        method: few_shot_episodes.summarize(values, len(drawn[0].queries))
        for method, values in found.items()
    }
    method = next(name for name in ("calibrated", "greedy", "overlap") if name in found)
    paired: dict[str, Any] = {}
    if against is not None:
        other = measure(others, bags, "episodes of the other run")
        paired["over_against"] = {
            name: statistics.paired_difference(values, other[name])
            for name, values in found.items()
        }
    if method != "overlap":
        paired["over_overlap"] = statistics.paired_difference(found[method], found["overlap"])
    return {
        **summaries[method],
        **summaries,
        **paired,
        **of_lm,
        "method": method,
        "chance": 1 / episodes.ways,
        "words": len(bags[0]),
        "classes": len(images.class_names),
        "rejected": [list(reject) for reject in images.rejects],
        "per_episode": {name: values.tolist() for name, values in found.items()},
    }


def read_bags(
    opened: word_images.WordImages, images: labeled.Labeled, config: WordsConfig
) -> tuple[list[tuple[str, ...]], np.ndarray]:
    """The words of each image, and its class, int64 [M]; images are read once, in batches.

    Raises:
        UserError: no image could be read, or these words do not exist.
    """
    num_codes = _num_codes(opened, config)
    table = WordTable(opened.words)
    bags: list[tuple[str, ...]] = []
    class_ids: list[int] = []
    batch: list[np.ndarray] = []

    def write_batch() -> None:
        codes = _chosen_codes(opened, np.stack(batch), config.top, num_codes)
        bags.extend(tuple(table.words[code] for code in row) for row in codes)
        batch.clear()

    for pixels, class_id in images.read():
        batch.append(image_files.fit(pixels, opened.tokenizer.image_size))
        class_ids.append(class_id)
        if len(batch) == _BATCH_SIZE:
            write_batch()
    if batch:
        write_batch()
    if not bags:
        reason = f" ({images.rejects[0][1]})" if images.rejects else ""
        raise UserError(f"No image could be read{reason}.")
    return bags, np.asarray(class_ids)


def _num_codes(opened: word_images.WordImages, config: WordsConfig) -> int:
    """How many of an image's first codes are its words."""
    ends = code_grids.ends(opened.tokenizer.grids)
    levels = config.levels or min(2, len(ends))
    if levels > len(ends):
        raise UserError(f"This image tokenizer has {len(ends)} levels, not {levels}.")
    if config.top is not None and config.top > len(opened.words):
        raise UserError(f"There are only {len(opened.words):,} words, not {config.top:,}.")
    return ends[levels - 1]


def _chosen_codes(
    opened: word_images.WordImages, pixels: np.ndarray, top: int | None, num_codes: int
) -> np.ndarray:
    """Codes int [B, M] whose words stand for each image."""
    if top is None:
        return opened.tokenizer.encode(pixels)[:, :num_codes]
    scores = opened.relative_scores(pixels)
    if scores is None:
        raise UserError("This run has no retriever to rank words by; give levels, not top words.")
    return np.argsort(-scores, axis=1, kind="stable")[:, :top]
