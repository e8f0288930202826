"""How much the words of test images mean, and how far counting them tells classes apart.

Relative scores compare a word with all others for one image (docs/papers/spae.md); they are
given for each kind of word features, since a retriever that has seen the classes, and names of held-out
classes among the features, help.
"""

import dataclasses
from typing import Any

import numpy as np

from rag_mm.core import code_grids
from rag_mm.eval import few_shot_episodes
from rag_mm.models.spae import semantic
from rag_mm.stages.shared import frozen, world_config
from rag_mm.stages.spae import word_features
from rag_mm.worlds.emoji import art, emoji_scenes

# n-way, k-shot
TASKS = ((2, 1), (2, 3), (5, 1), (5, 3))
_NUM_EPISODES = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class TestWords:
    """Test images of held-out classes as codes of words.

    Attributes:
        words: the word of each code.
        codes: int32 [Q, N].
        ends: number of codes up to each level.
        names: the words of each image's name.
        class_ids: int64 [Q], or None where there are no classes.
    """

    words: tuple[str, ...]
    codes: np.ndarray
    ends: tuple[int, ...]
    names: list[frozenset[str]]
    class_ids: np.ndarray | None

    def by_level(self) -> list[np.ndarray]:
        """The codes of each level, int32 [Q, n]."""
        return np.split(self.codes, self.ends[:-1], axis=1)

    def bags(self, num_codes: int) -> list[tuple[str, ...]]:
        """The first words of each image."""
        return [tuple(self.words[code] for code in row[:num_codes]) for row in self.codes]


def describe(
    source: world_config.SplitDocuments,
    rows: np.ndarray,
    tokenizer: frozen.FrozenTokenizer,
    codes: np.ndarray,
) -> TestWords:
    """The images `rows` of a world, whose codes int32 [Q, N] are words of an image tokenizer."""
    if isinstance(source, emoji_scenes.Scenes):
        aliases, class_ids = art.load_art().names, source.class_ids[rows]
        names = [word_features.words_of(" ".join(aliases[i])) for i in class_ids]
    else:
        names = [word_features.words_of(source.full_caption(int(row))) for row in rows]
        class_ids = None
    ends = tuple(code_grids.ends(tokenizer.grids))
    assert tokenizer.words is not None
    return TestWords(tokenizer.words, codes, ends, names, class_ids)


def per_image(
    test: TestWords, embeddings: np.ndarray, features: dict[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Figures of each image, float [Q], by level and name.

    Args:
        test: the images' words.
        embeddings: of the images in the retriever, float32 [Q, E].
        features: of the words by kind, float32 [K, E].

    Returns:
        `level1` and so on, each with `relative_score_all_names` and so on, the mean over the level's words,
        and `named`, whether one of them is in the image's name.
    """
    index = {word: number for number, word in enumerate(test.words)}
    own = np.zeros((len(test.codes), len(test.words)), bool)
    for row, words in enumerate(test.names):
        own[row, [index[word] for word in words if word in index]] = True
    scores = {kind: semantic.relative_scores(embeddings, array) for kind, array in features.items()}
    figures = {}
    for number, codes in enumerate(test.by_level(), 1):
        level = {
            f"relative_score_{kind}": np.take_along_axis(of_words, codes, axis=1).mean(axis=1)
            for kind, of_words in scores.items()
        }
        level["named"] = np.take_along_axis(own, codes, axis=1).any(axis=1).astype(np.float64)
        figures[f"level{number}"] = level
    return figures


def overlap(test: TestWords, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Accuracy of each episode of n-way k-shot classification by counting equal words, float [E].

    Returns:
        By number of words, those of the first levels above the full grid (`first5`, `first21`), and task
        (`2way1shot`); {} without classes, or where too few have enough images.
    """
    if test.class_ids is None:
        return {}
    result = {}
    counts = np.bincount(test.class_ids)
    for end in [end for end in test.ends[:-1] if end > 1][:2]:
        bags, tasks = test.bags(end), {}
        for ways, shots in TASKS:
            if (counts > shots).sum() < ways:
                continue
            config = few_shot_episodes.EpisodeConfig(
                ways, shots, num_episodes=_NUM_EPISODES, seed=seed
            )
            episodes = few_shot_episodes.draw_episodes(test.class_ids, config)
            found = few_shot_episodes.measure(episodes, bags, ())["overlap"]
            tasks[f"{ways}way{shots}shot"] = found
        result[f"first{end}"] = tasks
    return result


def means(tree: Any) -> Any:
    """The tree with the mean of each array in its place."""
    if isinstance(tree, dict):
        return {name: means(value) for name, value in tree.items()}
    return float(np.mean(tree))
