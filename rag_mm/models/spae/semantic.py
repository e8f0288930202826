"""SPAE's semantic guidance (docs/papers/spae.md): words near an image are its codes' targets.

Each word and each image has an embedding of a frozen CLIP. The words whose relative score with an image is at
least a level's threshold are the image's pool at that level, from which the level's codes are drawn near.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from rag_mm.core import checks

_MAX_LOGITS = 2**26  # Computed at once: 256 MiB in float32.


@dataclasses.dataclass(frozen=True)
class SemanticConfig:
    """How strongly words of an image's pools attract its codes.

    Attributes:
        alpha: weight of the loss; 0 switches it off, and the images need no pools.
        logit_scale: of the softmax over words of -||z - e||^2 / (2 m), m being the codebook's mean squared
            entry.
        is_balanced: the loss is also multiplied by (other losses / this loss), without a gradient, as in
            the paper.
    """

    alpha: float = 0.0
    logit_scale: float = 0.5
    is_balanced: bool = True

    def __post_init__(self):
        checks.at_least(self, 0, "alpha")
        checks.above(self, 0, "logit_scale")


def relative_scores(
    embeddings: Float[Array | np.ndarray, "B E"], features: Float[Array | np.ndarray, "K E"]
) -> Float[Array | np.ndarray, "B K"]:
    """Similarity of each image and word, scaled for each image so that its best word has 1, its worst 0.

    A word whose features are all zero, as one in no name, has 0 and does not count for the others.
    """
    scores = embeddings @ features.T
    is_known = np.asarray((features**2).sum(axis=1)[None] > 0)
    if not is_known.any():
        return 0 * scores
    low = scores.min(axis=1, keepdims=True, initial=np.inf, where=is_known)
    spread = scores.max(axis=1, keepdims=True, initial=-np.inf, where=is_known) - low
    return is_known * (scores - low) / (spread + (spread == 0))


def semantic_loss(
    targets: Sequence[Float32[Array, "B _ _ D"]],
    codebook: Float32[Array, "K D"],
    pool_words: Int[Array, "B M"],
    pool_sizes: Int[Array, "B L"],
    key: Key[Array, ""],
    logit_scale: float,
) -> Float32[Array, ""]:
    """Mean of -log softmax(-scaled distance of z_l)[c] over levels, places and one word c of each pool.

    Args:
        targets: z_l of each level (`ops.quantize.level_targets`); the first L are used.
        codebook: the words' vectors, without a gradient.
        pool_words: words of each image by falling relative score, padded at the end.
        pool_sizes: how many of them are in the pool of each level, at least 1.
        key: for the choice of words.
        logit_scale: see `SemanticConfig`.
    """
    codebook = jax.lax.stop_gradient(codebook)
    factor, losses = logit_scale / (2 * jnp.mean(codebook**2)), []
    for level, target in enumerate(targets[: pool_sizes.shape[1]]):
        z = target.reshape(target.shape[0], -1, target.shape[-1])
        sizes = pool_sizes[:, level, None]
        shares = jax.random.uniform(jax.random.fold_in(key, level), z.shape[:2])
        chosen = (shares * sizes.astype(jnp.float32)).astype(jnp.int32)
        words = jnp.take_along_axis(pool_words, chosen, axis=1)
        losses.append(jnp.mean(_negative_log_softmax(z, words, codebook, factor)))
    return jnp.mean(jnp.stack(losses))


def _negative_log_softmax(
    z: Float32[Array, "B P D"],
    words: Int[Array, "B P"],
    codebook: Float32[Array, "K D"],
    factor: Float32[Array, ""],
) -> Float32[Array, "B P"]:
    """-log softmax(-factor * ||z - e||^2)[word]; many logits are computed in chunks of words, twice."""
    norms = jnp.sum(codebook**2, axis=-1)

    def logits(vectors: Array, norms: Array) -> Array:
        # ||z||^2 is the same for every word.
        return (2 * z @ vectors.T - norms[None, None]) * factor

    size = max(1, _MAX_LOGITS // (z.shape[0] * z.shape[1]))
    if size >= len(codebook):
        whole = logits(codebook, norms)
        own = jnp.take_along_axis(whole, words[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(whole, axis=-1) - own
    padding = -len(codebook) % size  # Infinitely far away.
    chunks = (
        jnp.pad(codebook, ((0, padding), (0, 0))).reshape(-1, size, codebook.shape[1]),
        jnp.pad(norms, (0, padding), constant_values=jnp.inf).reshape(-1, size),
    )
    of_chunk = jax.checkpoint(lambda chunk: jax.nn.logsumexp(logits(*chunk), axis=-1))
    total = jax.nn.logsumexp(jax.lax.map(of_chunk, chunks), axis=0)
    own = (2 * jnp.sum(z * codebook[words], axis=-1) - norms[words]) * factor
    return total - own


def balance(others: Float32[Array, ""], loss: Float32[Array, ""]) -> Float32[Array, ""]:
    """The factor others / loss, at most 1,000, without a gradient."""
    return jax.lax.stop_gradient(jnp.clip(others / jnp.maximum(loss, 1e-9), 0, 1e3))
