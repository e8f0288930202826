"""Contrastive decoding of one model against its own null prompt: CD-K (CM3Leon, equation 3).

Li et al. (2022, arXiv 2210.15097) take a large model as the expert and a small one as the amateur. In CM3Leon
both are one model, which reads the full prompt as the expert and a null prompt as the amateur
(docs/papers/cm3leon.md).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from rag_mm.core.errors import UserError
from rag_mm.decode import guidance
from rag_mm.decode.token_choice import Combine

MAX_K = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Contrast:
    """CD-K: samples by log p_full - log p_null^(1 / tau), of the plausible tokens

        V = {p_full >= max(alpha * k-th largest p_full, floor * max p_full)}

    With k = 1 and alpha = 1, V holds the likeliest token alone: greedy decoding. A k above 1 lets in tokens
    of any probability where the model is sure of one; the floor keeps those out.

    Attributes:
        k: at least 1; the larger, the more tokens are plausible.
        alpha: in [0, 1], share of the k-th largest probability that a token needs.
        amateur_temperature: tau, from 1e-30 to 1e30; a lower one contrasts more.
        floor: in [0, 1], share of the largest probability that a token needs whatever k is; 0: none.
        null: what the amateur reads, documents | bare | caption (`decode.guidance`).
    """

    k: int = 1
    alpha: float = 0.1
    amateur_temperature: float = 1.0
    floor: float = 0.0
    null: str = guidance.BARE

    def __post_init__(self):
        guidance.check_null(self.null)
        is_integer = isinstance(self.k, int | np.integer) and not isinstance(self.k, bool)
        if not is_integer or self.k < 1:
            raise UserError(f"contrast k is {self.k!r}; give an integer of at least 1.")
        guidance.check_number("contrast alpha", self.alpha, 0, 1)
        guidance.check_number("contrast floor", self.floor, 0, 1)
        # Logits are divided by it, in float32.
        largest = guidance.LARGEST
        guidance.check_number("amateur temperature", self.amateur_temperature, 1 / largest, largest)

    @property
    def streams(self) -> tuple[str, ...]:
        """The prompts of an image: the expert's, then the amateur's."""
        return guidance.FULL, self.null

    def combine(self) -> Combine:
        """For `sampler.sample`; other numbers need no other program."""
        return jax.tree_util.Partial(
            contrast,
            jnp.int32(min(self.k, MAX_K)),
            guidance.log_of(self.alpha),
            jnp.float32(self.amateur_temperature),
            guidance.log_of(self.floor),
        )


def contrast(
    k: Int32[Array, ""],
    log_alpha: Float32[Array, ""],
    amateur_temperature: Float32[Array, ""],
    log_floor: Float32[Array, ""],
    logits: Float32[Array, "2 B V"],
    allowed: Bool[Array, "#B V"],
) -> Float32[Array, "B V"]:
    """The scores of the plausible tokens, up to a constant in each row; -inf for the others.

    Shares of a probability are differences of logits, so that nothing is normalized. Where fewer than k
    tokens are allowed, the k-th largest probability is 0.
    """
    full = jnp.where(allowed, logits[0], -jnp.inf)
    highest = full.max(axis=-1, keepdims=True)
    # A sort takes about as long as all else in a step of a small model on a CPU.
    kth = jax.lax.cond(k == 1, lambda: highest, lambda: _kth_largest(full, k))
    least = jnp.maximum(kth + log_alpha, highest + log_floor)
    return jnp.where(full >= least, logits[0] - logits[1] / amateur_temperature, -jnp.inf)


def _kth_largest(values: Float32[Array, "B V"], k: Int32[Array, ""]) -> Float32[Array, "B 1"]:
    """Of each row; -inf where it has fewer than k values."""
    # By comparison, not by index: the batch may be split over devices.
    is_kth = jnp.arange(values.shape[-1], 0, -1, dtype=jnp.int32)[None] == k
    return jnp.where(is_kth, jnp.sort(values, axis=-1), -jnp.inf).max(axis=-1, keepdims=True)
