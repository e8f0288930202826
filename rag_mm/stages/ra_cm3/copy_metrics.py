"""Metrics of how well a decoder copies: its predictions of unseen art codes with and without documents.

Decoders learn to copy late and suddenly, and the training loss barely shows it. The difference that documents
make to the prediction of unseen classes does (docs/papers/ra_cm3.md#evaluation).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.data import token_documents
from rag_mm.decode.tasks import Generator
from rag_mm.eval import likelihood, scene_accuracy


@dataclasses.dataclass(frozen=True, eq=False)
class CopyWatch:
    """Scores test documents of unseen classes at every checkpoint; see `training.train`'s `watch`.

    Attributes:
        mains: Q test documents.
        docs: documents that each may read, best last; empty lists for the baseline.
        art: bool [Q, N], the codes that show an entity.
        num_steps: number of training steps.
        min_gain: minimum gain of the top-1 share of art codes by documents at half of the steps, in [0, 1];
            0 disables the check.
    """

    mains: Sequence[token_documents.Example]
    docs: Sequence[Sequence[token_documents.Example]]
    art: np.ndarray
    num_steps: int
    min_gain: float = 0.0

    def __call__(self, step: int, generator: Generator) -> dict[str, float]:
        """Returns `art_nll_docsK` in nats and `art_top1_docsK` in [0, 1], for K = 0 and the largest number.

        Raises:
            UserError: half of the steps are done and the gain by documents is below `min_gain`.
        """
        max_docs = max(len(docs) for docs in self.docs)
        figures = {}
        for count in sorted({0, max_docs}):
            docs = [documents[-count:] if count else [] for documents in self.docs]
            scores = likelihood.score_codes(generator, self.mains, docs)
            for name, values in (("nll", scores.nll), ("top1", scores.is_top1)):
                mean = scene_accuracy.per_document(values, self.art).mean()
                figures[f"art_{name}_docs{count}"] = float(mean)
        gain = figures[f"art_top1_docs{max_docs}"] - figures["art_top1_docs0"]
        if self.min_gain and 2 * step >= self.num_steps and gain < self.min_gain:
            raise UserError(
                f"Copying has not started at step {step} of {self.num_steps}: documents raise the top-1 "
                f"share of unseen art codes by {gain:.3f}, min_gain is {self.min_gain}; try look_back, "
                "induction_init, more steps or smaller batches."
            )
        return figures
