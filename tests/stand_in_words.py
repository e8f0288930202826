"""Images as words without training, and language models that answer by a rule."""

import collections
import re
import types
from collections.abc import Sequence

import numpy as np

WORDS = tuple(
    "black coal ash slate iron stone smoke cloud silver pearl milk snow cotton ivory chalk white".split()
)
GRIDS = ((1, 1), (2, 2), (4, 4))


class BrightnessTokenizer:
    """The code of a place is the mean brightness of the patch, square or image that it stands for."""

    image_size = 8
    grids = GRIDS
    num_codes = 21
    codebook_size = len(WORDS)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == (8, 8, 3)
        parts = []
        for rows, columns in GRIDS:
            blocks = pixels.reshape(len(pixels), rows, 8 // rows, columns, 8 // columns, 3)
            parts.append(blocks.mean(axis=(2, 4, 5)).reshape(len(pixels), -1))
        return (np.concatenate(parts, axis=1) / 16).astype(np.int32)

    def decode(self, codes: np.ndarray, num_levels: int | None = None) -> np.ndarray:
        ends = np.cumsum([rows * columns for rows, columns in GRIDS]).tolist()
        level = ends.index(codes.shape[1]) if num_levels is None else num_levels - 1
        rows, columns = GRIDS[level]
        last = codes[:, ends[level] - rows * columns : ends[level]].reshape(-1, rows, columns)
        large = last.repeat(8 // rows, axis=1).repeat(8 // columns, axis=2)
        return np.repeat((large * 16 + 8).astype(np.uint8)[..., None], 3, axis=3)


class WordedImages:
    """What `word_images.load` returns, for brightness; the word nearest in brightness scores best."""

    tokenizer = BrightnessTokenizer()
    words = WORDS

    def __init__(self, has_retriever: bool = True):
        self._has_retriever = has_retriever

    def relative_scores(self, pixels: np.ndarray) -> np.ndarray | None:
        if not self._has_retriever:
            return None
        mean = pixels.mean(axis=(1, 2, 3))[:, None] / 16 - 0.5
        distance = np.abs(mean - np.arange(len(WORDS)))
        return (1 - distance / distance.max(axis=1, keepdims=True)).astype(np.float32)


class BiasedReader:
    """Counts equal words as asked, but likes each label more than the one before it."""

    vocabulary = WORDS

    def __init__(self):
        self.prefixes: list[str] = []

    def score(
        self,
        prompts: Sequence[str],
        candidates: Sequence[str],
        *,
        prefix: str | None = None,
        calibration: Sequence[str] = (),
    ) -> np.ndarray:
        assert not calibration and prefix is not None
        assert all(candidate.startswith(" ") for candidate in candidates)
        self.prefixes.append(prefix)
        shown = re.findall(r"Input: (.*)\nOutput: (.*)\n", prefix)
        scores = np.zeros((len(prompts), len(candidates)), np.float32)
        for row, prompt in enumerate(prompts):
            (asked,) = re.findall(r"Input: (.*)\nOutput:$", prompt)
            for column, candidate in enumerate(candidates):
                known = [set(words.split()) for words, label in shown if label == candidate[1:]]
                votes = sum(word in bag for bag in known for word in asked.split())
                scores[row, column] = votes + 1000 * column
        return scores

    def generate(self, prompts: Sequence[str], *, num_tokens: int) -> types.SimpleNamespace:
        """The label of the last example, and a further line."""
        texts = [f" {re.findall(r'Output: (.*)', prompt)[-1]}\nInput:" for prompt in prompts]
        return types.SimpleNamespace(texts=texts)


class MajorityReader:
    """Writes at each place the most frequent word of the examples, the first in the table of a tie."""

    vocabulary = WORDS

    def __init__(self):
        self.prompts: list[str] = []

    def generate(self, prompts: Sequence[str], *, num_tokens: int) -> types.SimpleNamespace:
        self.prompts += prompts
        return types.SimpleNamespace(texts=[self._answer(prompt) for prompt in prompts])

    def _answer(self, prompt: str) -> str:
        rows = [answer.split() for answer in re.findall(r"A: (.*)\n", prompt)]
        counts = [collections.Counter(column) for column in zip(*rows, strict=True)]
        best = [max(sorted(c, key=WORDS.index), key=c.__getitem__) for c in counts]
        return " " + " ".join(best) + "\nC: more"
