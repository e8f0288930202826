"""Watching a decoder learn to copy: how well it foresees art it never saw, with a document and without.

Copying comes late and all at once, and the training loss hardly tells of it; the difference that a document
makes to art of unseen classes does (docs/papers/ra_cm3.md#evaluation).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.data import sequences
from rag_mm.decode.tasks import Generator
from rag_mm.eval import likelihood, scene_accuracy


@dataclasses.dataclass(frozen=True, eq=False)
class CopyWatch:
    """Test documents of unseen classes, asked about whenever training is watched.

    Attributes:
        mains: Q documents.
        docs: what each may read; nothing for the control.
        art: bool [Q, N], the codes that show an entity.
        num_steps: steps of the whole training.
        min_gain: how much documents must add to the top-1 share of art codes by half time; 0 asks
            for nothing.
    """

    mains: Sequence[sequences.Example]
    docs: Sequence[Sequence[sequences.Example]]
    art: np.ndarray
    num_steps: int
    min_gain: float = 0.0

    def __call__(self, step: int, generator: Generator) -> dict[str, float]:
        """`art_nll_docsK` in nats and `art_top1_docsK` in [0, 1], K 0 and as many as are given.

        Raises:
            UserError: half of the steps are done and documents do not help by `min_gain`.
        """
        most = max(len(given) for given in self.docs)
        figures = {}
        for count in sorted({0, most}):
            given = [docs[-count:] if count else [] for docs in self.docs]
            scores = likelihood.score_codes(generator, self.mains, given)
            for name, values in (("nll", scores.nll), ("top1", scores.is_top1)):
                mean = scene_accuracy.per_document(values, self.art).mean()
                figures[f"art_{name}_docs{count}"] = float(mean)
        gain = figures[f"art_top1_docs{most}"] - figures["art_top1_docs0"]
        if self.min_gain and 2 * step >= self.num_steps and gain < self.min_gain:
            raise UserError(
                f"Copying has not begun at step {step} of {self.num_steps}: documents raise the top-1 "
                f"share of unseen art by {gain:.3f} only (least: {self.min_gain}); smear_lags, "
                "induction_init, more steps and smaller batches make it begin."
            )
        return figures
