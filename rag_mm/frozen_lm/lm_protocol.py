"""What a frozen language model offers: scores of given answers, completions, and its vocabulary."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Completions:
    """Completions of a batch of prompts, without the prompts.

    Attributes:
        tokens: the token ids of each completion, up to and excluding the first stop token; empty where a
            model does not tell them.
        texts: the same decoded, so that prompt + text is the whole text; None without a tokenizer.
    """

    tokens: list[list[int]]
    texts: list[str] | None


class FrozenLM(Protocol):
    """A language model that is used as it is, such as one that reads images as words."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The text of each token id, with its leading space; empty where it has none of its own."""

    def score(
        self,
        prompts: Sequence[str],
        candidates: Sequence[str],
        *,
        prefix: str | None = None,
        calibration: Sequence[str] = (),
    ) -> np.ndarray:
        """log p(candidate | prefix + prompt) in nats, float32 [B, C].

        The whole text, prefix + prompt + candidate, is tokenized at once. Its tokens that end behind the
        prompt are those of the candidate, so a token that begins in the prompt and ends in the candidate
        counts as the candidate's.

        Args:
            prompts: B texts.
            candidates: C texts that may follow each of them, such as " cat".
            prefix: a text before every prompt, such as the examples of a few-shot prompt.
            calibration: further prompts, behind the same prefix, that ask nothing; the mean of each
                candidate's log-probability after them is subtracted (0 without any). It removes what a model
                prefers regardless of the question.

        Raises:
            UserError: there is no prompt or candidate, one is empty or too long, or the model gives no
                log-probabilities.
        """

    def generate(
        self, prompts: Sequence[str], *, num_tokens: int = 64, temperature: float = 0.0
    ) -> Completions:
        """Completes each prompt by at most `num_tokens` tokens; temperature 0 is greedy."""
