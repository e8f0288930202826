"""Guidance: logits moved away from those of a null prompt (CM3Leon; docs/papers/cm3leon.md).

A stream is one prompt of an image, and all streams of an image share the sampled codes. The first reads
everything; the others are null prompts, which leave out what is to guide:

| stream | reads before the image |
|---|---|
| full | documents and caption: `EOD documents text BRK` |
| documents | the caption masked whole, as in training: `EOD documents S0 BRK` |
| bare | neither: `EOD S0 BRK` |
| caption | the caption alone: `EOD text BRK` |

A model that masks captions in training reads null prompts without training for guidance.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from rag_mm.core.errors import UserError
from rag_mm.decode.token_choice import Combine

FULL, DOCUMENTS, BARE, CAPTION = "full", "documents", "bare", "caption"
NULLS = {
    DOCUMENTS: "sequences whose caption is masked whole (masking.caption_prob)",
    BARE: "sequences without documents whose caption is masked whole (sequences.num_docs_weights and "
    "masking.caption_prob)",
    CAPTION: "sequences without documents (sequences.num_docs_weights)",
}
"""Null prompts, and the training that shows them to a model."""
LARGEST = 1e30
"""Of weights: their products with logits are still finite in float32."""


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of one or two conditions, with l the logits of a stream:

        one condition: l_null + w (l_full - l_null)
        two: l_bare + w_d (l_documents - l_bare) + w (l_full - l_documents)

    Both hold exactly where they keep one stream alone, at w of 0 and 1: the codes are then those that this
    stream samples by itself with the same seed.

    Attributes:
        weight: w, from 0 to `LARGEST`; 1 is plain sampling, 0 samples from the null prompt.
        null: documents | bare | caption. With documents it is the caption that guides, with caption the
            documents ("retrieval guidance"), with bare both.
        documents_weight: w_d, from 0 to `LARGEST`, of the documents where they and the caption guide
            separately, which takes three streams; None: one condition. With it `null` is bare.
        plausible: alpha in [0, 1]; keeps only tokens with p_full >= alpha max p_full. 0 keeps all.
    """

    weight: float = 1.0
    null: str = BARE
    documents_weight: float | None = None
    plausible: float = 0.0

    def __post_init__(self):
        check_null(self.null)
        check_number("guidance weight", self.weight, 0, LARGEST)
        check_number("plausible", self.plausible, 0, 1)
        if self.documents_weight is not None:
            check_number("documents weight", self.documents_weight, 0, LARGEST)
            if self.null != BARE:
                raise UserError(
                    f"null is {self.null!r}, but guidance with a documents weight has two null prompts, "
                    f"{DOCUMENTS} and {BARE}; leave null out."
                )

    @property
    def streams(self) -> tuple[str, ...]:
        """The prompts of an image, full first."""
        if self.documents_weight is None:
            return FULL, self.null
        return FULL, DOCUMENTS, BARE

    def combine(self) -> Combine:
        """For `sampler.sample`; other weights need no other program."""
        w, w_d = self.weight, self.documents_weight
        weights = (w, 1 - w) if w_d is None else (w, w_d - w, 1 - w_d)
        return jax.tree_util.Partial(guide, jnp.float32(weights), log_of(self.plausible))


def guide(
    weights: Float32[Array, " S"],
    log_plausible: Float32[Array, ""],
    logits: Float32[Array, "S B V"],
    allowed: Bool[Array, "#B V"],
) -> Float32[Array, "B V"]:
    """The weighted sum of the streams' logits; -inf where p_full is below plausible times its maximum.

    A sum, and not differences added up: a weight of 0 then leaves nothing of a stream, not even its rounding.
    """
    combined = sum(weight * stream for weight, stream in zip(weights, logits, strict=True))
    full = jnp.where(allowed, logits[0], -jnp.inf)
    least = full.max(axis=-1, keepdims=True) + log_plausible
    return jnp.where(full >= least, combined, -jnp.inf)


def log_of(share: float) -> Float32[Array, ""]:
    """The logarithm of a share of a probability; -inf for 0."""
    return jnp.float32(math.log(share) if share else -math.inf)


def check_null(null: Any) -> None:
    """Raises UserError unless `null` is the name of a null prompt."""
    if not isinstance(null, str) or null not in NULLS:
        raise UserError(f"null is {null!r}; give one of {', '.join(NULLS)}.")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises UserError unless `value` is a finite number in [low, high]; bools are no numbers."""
    is_number = isinstance(value, int | float | np.integer | np.floating)
    # Not by isfinite, which overflows at integers of more than 308 digits.
    if not is_number or isinstance(value, bool) or not -math.inf < value < math.inf:
        raise UserError(f"{name} is {value!r}; give a finite number.")
    if not low <= value <= high:
        raise UserError(f"{name} is {value}; give a number from {low:g} to {high:g}.")


def null_read(stream: str, has_documents: bool) -> str:
    """The prompt that a stream reads: without documents, `documents` is the prompt `bare`."""
    return BARE if stream == DOCUMENTS and not has_documents else stream


def check_shown(streams: Collection[str], shown: Collection[str]) -> None:
    """Raises UserError if a stream reads a null prompt that training never showed the model.

    Args:
        streams: what those of a `Guidance` or a `Contrast` read (`null_read`).
        shown: null prompts that it knows.
    """
    for stream in streams:
        if stream != FULL and stream not in shown:
            known = f"choose another null prompt ({', '.join(sorted(shown))})" if shown else ""
            raise UserError(
                f"This model never saw the null prompt {stream!r}, which takes {NULLS[stream]} in training; "
                f"{known + ', ' if known else ''}train it with those, or generate without guidance and "
                "contrast."
            )
