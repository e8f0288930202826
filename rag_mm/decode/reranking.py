"""Re-ranking: several candidates for every image, of which the one with the highest score is kept.

Candidates of several kinds take turns, such as half by guidance and half by contrastive decoding (CM3Leon,
figure 4).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt32

from rag_mm.decode import tasks

Generate = Callable[[UInt32[np.ndarray, " B"]], Shaped[np.ndarray, "B ..."]]
Score = Callable[[Shaped[np.ndarray, "B ..."]], Float[np.ndarray, " B"]]


class Candidates(NamedTuple):
    """The candidates of B examples in the order in which they were made, and their scores.

    Attributes:
        items: codes or images.
        scores: higher is better; None for a single candidate, which is not scored.
    """

    items: Shaped[np.ndarray, "N B ..."]
    scores: Float[np.ndarray, "N B"] | None

    @property
    def best(self) -> Shaped[np.ndarray, "B ..."]:
        """Each example's candidate with the highest score, the first of equals."""
        if self.scores is None:
            return self.items[0]
        return self.items[self.scores.argmax(axis=0), np.arange(self.items.shape[1])]


def best_of(
    generate: Generate | Sequence[Generate],
    score: Score,
    num_examples: int,
    num_candidates: int,
    seed: int,
) -> Candidates:
    """Generates several candidates per example and scores them.

    Args:
        generate: seeds -> one candidate per example; several functions take turns, the first one first.
        score: candidates -> how good each is.
        num_examples: B.
        num_candidates: at least 1; with 1, `score` is not called.
        seed: determines the seeds of all candidates.
    """
    kinds = [generate] if callable(generate) else list(generate)
    items = [
        kinds[i % len(kinds)](tasks.make_seeds(seed, num_examples, i))
        for i in range(num_candidates)
    ]
    scores = None if num_candidates == 1 else np.stack([score(each) for each in items])
    return Candidates(np.stack(items), scores)
