"""Symmetric InfoNCE over the pairs of a batch, each device with the rows of its own pairs only."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float32, Int

from rag_mm.core import sharding
from rag_mm.ops import losses


def info_nce(
    left: Float32[Array | np.ndarray, "B D"],
    right: Float32[Array | np.ndarray, "B D"],
    scale: Float32[Array | np.ndarray, ""],
    class_ids: Int[Array | np.ndarray, " B"] | None = None,
    num_chunks: int = 1,
) -> tuple[Float32[Array, " B"], Bool[Array, " B"]]:
    """Symmetric contrastive loss (CLIP, Radford et al. 2021, figure 3), without [B, B] on any device.

    On a mesh that splits the batch over n devices, each gathers all embeddings and compares those of its own
    B / n pairs with them, in either direction: [B / n, B] similarities, or [B / n / num_chunks, B] at a time,
    since the backward pass computes those of each chunk anew.

    Args:
        left, right: embeddings; row i of both is a pair.
        scale: 1 / temperature, which multiplies their products.
        class_ids: examples of one class, other than the pair itself, are no negatives; negative ids have no
            class. None if all examples are negatives.
        num_chunks: into how many chunks each device splits its pairs.

    Returns:
        The loss of each pair, mean of both directions in nats, and whether row i of `right` alone is the most
        similar to row i of `left`.

    Raises:
        ValueError: num_chunks is below 1.
    """
    if num_chunks < 1:
        raise ValueError(f"num_chunks is {num_chunks}; give at least 1")
    left, right, ids, scale = jax.tree.map(jnp.asarray, (left, right, class_ids, scale))
    spec = sharding.activation_spec("batch")
    if spec is None:
        return _local_pairs(left, right, ids, scale, num_chunks)
    left, right = (sharding.place(x, "batch", None) for x in (left, right))
    ids = None if ids is None else sharding.place(ids, "batch")
    mapped = jax.shard_map(
        partial(_local_pairs, num_chunks=num_chunks, axes=sharding.ACTIVATION_AXES["batch"]),
        in_specs=(spec, spec, spec, PartitionSpec()),
        out_specs=(spec, spec),
    )
    return mapped(left, right, ids, scale)


def _local_pairs(
    left: jax.Array,
    right: jax.Array,
    ids: jax.Array | None,
    scale: jax.Array,
    num_chunks: int,
    axes: str | tuple[str, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The result of `info_nce` for a device's own pairs; `axes` are those over which others have more."""

    def all_of(x: jax.Array) -> jax.Array:
        return x if axes is None else jax.lax.all_gather(x, axes, tiled=True)

    first = 0 if axes is None else jax.lax.axis_index(axes) * len(left)
    own = first + jnp.arange(len(left))
    shared = (ids, None if ids is None else all_of(ids), own, scale, num_chunks)
    forth, hits = _one_way(left, all_of(right), *shared)
    back, _ = _one_way(right, all_of(left), *shared)
    return (forth + back) / 2, hits


def _one_way(
    queries: jax.Array,
    keys: jax.Array,
    query_ids: jax.Array | None,
    key_ids: jax.Array | None,
    own: jax.Array,
    scale: jax.Array,
    num_chunks: int,
) -> tuple[jax.Array, jax.Array]:
    """Loss of each query in nats, and whether its own key alone is the best."""

    def chunk(_: None, part: tuple) -> tuple[None, tuple[jax.Array, jax.Array]]:
        vectors, ids, at = part
        logits = scale * jnp.einsum("id,jd->ij", vectors, keys)
        is_own = jnp.arange(len(keys))[None] == at[:, None]
        if key_ids is not None:
            is_same = (ids[:, None] == key_ids[None]) & (ids >= 0)[:, None] & ~is_own
            logits = jnp.where(is_same, -jnp.inf, logits)
        nll = losses.token_nll(logits[None], at[None])[0]
        # Ties do not count as hits: to a collapsed model all similarities are equal.
        own_logits = jnp.where(is_own, logits, -jnp.inf).max(axis=1, keepdims=True)
        return None, (nll, (logits >= own_logits).sum(axis=1) == 1)

    parts = (queries, query_ids, own)
    if num_chunks == 1:
        return chunk(None, parts)[1]
    count = len(queries)
    size = -(-count // num_chunks)

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, size * num_chunks - count), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(num_chunks, size, *x.shape[1:])

    _, (nll, hits) = jax.lax.scan(jax.checkpoint(chunk), None, jax.tree.map(split, parts))
    return nll.reshape(-1)[:count], hits.reshape(-1)[:count]
