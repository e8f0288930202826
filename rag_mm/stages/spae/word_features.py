"""Features of words in a retriever's embedding space, from templates or from the names that contain them."""

import collections
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from rag_mm.memory.model_protocols import Encoder
from rag_mm.stages.shared import world_config
from rag_mm.worlds.emoji import art

KINDS = ("templates", "all_names", "seen_names")


@dataclasses.dataclass(frozen=True)
class Names:
    """Names of what a world shows.

    Attributes:
        texts: one text for each name, as the retriever reads it.
        words: the words of each name, aliases included.
        is_seen: which of them no split holds out: bool [N].
    """

    texts: list[str]
    words: list[frozenset[str]]
    is_seen: np.ndarray

    def counts(self) -> collections.Counter[str]:
        """In how many names each word occurs."""
        return collections.Counter(word for words in self.words for word in words)


def words_of(text: str) -> frozenset[str]:
    """The lower-case words of a text."""
    return frozenset(re.findall("[a-z]+", text.lower()))


def names_of(world: world_config.EmojiWorld | world_config.OwnImages) -> Names:
    """Names of the emoji classes of a world, or the captions of the user's images."""
    if isinstance(world, world_config.EmojiWorld):
        seen = set(world.classes(*world_config.SEEN).tolist())
        ids = sorted(seen | set(world.classes(*world_config.HELD_OUT).tolist()))
        aliases = art.load_art().names
        texts = [aliases[i][0] for i in ids]
        words = [words_of(" ".join(aliases[i])) for i in ids]
        return Names(texts, words, np.array([i in seen for i in ids]))
    parts = [
        (world.scenes("train", *splits), is_seen)
        for splits, is_seen in ((world_config.SEEN, True), (world_config.HELD_OUT, False))
    ]
    texts = [source.full_caption(row) for source, _ in parts for row in range(len(source))]
    is_seen = np.concatenate([np.full(len(source), is_seen) for source, is_seen in parts])
    return Names(texts, [words_of(text) for text in texts], is_seen)


def from_templates(words: Sequence[str], templates: Sequence[str], encoder: Encoder) -> np.ndarray:
    """Mean embedding of the templates filled with a word, float32 [K, E], of length 1."""
    vectors = [encoder.encode_text([each.format(word) for word in words]) for each in templates]
    return _unit(np.sum(vectors, axis=0))


def from_names(
    words: Sequence[str], names: Names, encoder: Encoder, is_seen_only: bool
) -> np.ndarray:
    """Mean embedding of the names that contain a word, float32 [K, E]; zeros for a word in none of them.

    Args:
        words: the K words.
        names: names of what the images show.
        encoder: the retriever.
        is_seen_only: use only names that no split holds out.
    """
    used = np.flatnonzero(names.is_seen) if is_seen_only else np.arange(len(names.texts))
    vectors = encoder.encode_text([names.texts[i] for i in used])
    index = {word: number for number, word in enumerate(words)}
    sums = np.zeros((len(words), vectors.shape[1]))
    for vector, row in zip(vectors, used, strict=True):
        for word in names.words[row] & index.keys():
            sums[index[word]] += vector
    return _unit(sums)


def _unit(rows: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(lengths > 0, lengths, 1)).astype(np.float32)
