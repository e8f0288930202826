"""Questions and answers as rows of tokens, and their scores as a table: what every local model shares."""

from collections.abc import Callable, Sequence

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.frozen_lm.token_tree import Row

# A text -> its token ids, and the number of characters of the text up to the end of each token.
Encode = Callable[[str], tuple[Sequence[int], Sequence[int]]]


def check(prompts: Sequence[str], candidates: Sequence[str], calibration: Sequence[str]) -> None:
    """Raises UserError unless there are prompts and candidates, all of them texts, and no empty candidate."""
    for name, texts in (
        ("prompt", prompts),
        ("candidate", candidates),
        ("calibration", calibration),
    ):
        if isinstance(texts, str) or any(not isinstance(text, str) for text in texts):
            raise UserError(f"score takes sequences of texts; its {name} is {str(texts)[:40]!r}.")
        if name != "calibration" and not len(texts):
            raise UserError(f"There is no {name} to score; give at least one.")
    if "" in candidates:
        raise UserError("A candidate is the empty text, which has no probability; give other ones.")


def rows(
    encode: Encode,
    prompts: Sequence[str],
    candidates: Sequence[str],
    max_length: int,
    begin: Sequence[int] = (),
) -> list[Row]:
    """The tokens of every prompt with every candidate, the candidates of a prompt next to each other.

    Args:
        encode: the tokenizer.
        prompts: with their prefix.
        candidates: the texts that may follow.
        max_length: most tokens of a row.
        begin: ids before each text.

    Raises:
        UserError: nothing precedes a candidate, it has no token of its own, or a row is too long.
    """
    made = []
    for prompt in prompts:
        for candidate in candidates:
            ids, ends = encode(prompt + candidate)
            ids, ends = [*begin, *ids], [*(0 for _ in begin), *ends]
            own = [i for i, end in enumerate(ends) if end > len(prompt)]
            if not own:
                raise UserError(f"The candidate {candidate[:40]!r} has no token; give another one.")
            if own[0] == 0:
                raise UserError(
                    f"Nothing precedes the candidate {candidate[:40]!r}; give a prompt of at least one token."
                )
            if own[-1] >= max_length:
                raise UserError(
                    f"A prompt and its candidate have {own[-1] + 1:,} tokens, but the model reads at most "
                    f"{max_length:,}; shorten them."
                )
            made.append(Row(tuple(ids[: own[-1] + 1]), own[0]))
    return made


def table(
    log_probs: Callable[[list[Row]], np.ndarray],
    encode: Encode,
    prompts: Sequence[str],
    candidates: Sequence[str],
    *,
    prefix: str | None,
    calibration: Sequence[str],
    max_length: int,
    begin: Sequence[int] = (),
) -> np.ndarray:
    """`FrozenLM.score` of a local model, from the log-probability of each row's tokens from its start on."""
    check(prompts, candidates, calibration)
    texts = [(prefix or "") + text for text in (*prompts, *calibration)]
    made = rows(encode, texts, candidates, max_length, begin)
    return calibrate(log_probs(made).reshape(len(texts), len(candidates)), len(prompts))


def calibrate(scores: np.ndarray, num_prompts: int) -> np.ndarray:
    """The first rows of scores float32 [B + N, C], less the mean of the other N, if there are any."""
    asked, neutral = scores[:num_prompts], scores[num_prompts:]
    return asked - neutral.mean(axis=0) if len(neutral) else asked
