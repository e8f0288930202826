"""The KV cache: one pair of arrays per layer, updated in place at the same index for the whole batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rag_mm.nn.block import Attend, Heads
from rag_mm.nn.smear import Recent
from rag_mm.ops import attention


class LayerCache(NamedTuple):
    """Keys and values of one layer; `recent` as in `nn.block.Heads`.

    The layout suits products with a single query: with [B, S, K, H], XLA would transpose the whole cache for
    every token.
    """

    keys: Float[Array, "B K H S"]
    values: Float[Array, "B K H S"]
    recent: Recent | None = None


def make_cache(prefilled: Heads, num_steps: int) -> tuple[LayerCache, ...]:
    """Caches with room for `num_steps` tokens after the prompt, from `Decoder.prefill`'s [L, B, T, K, H]."""
    padding = ((0, 0), (0, 0), (0, 0), (0, num_steps))
    keys, values, recent = prefilled.k, prefilled.v, prefilled.recent
    return tuple(
        LayerCache(
            jnp.pad(_to_bkht(keys[i]), padding),
            jnp.pad(_to_bkht(values[i]), padding),
            None if recent is None else Recent(recent.q[i], recent.k[i]),
        )
        for i in range(keys.shape[0])
    )


def make_attend(index: Int[Array, ""], segment_ids: Int[Array | np.ndarray, "B S"]) -> Attend:
    """Attention of one new token per example: writes it to the cache at `index`, then attends up to it.

    Args:
        index: the same for all examples, since prompts are padded on the left.
        segment_ids: 0 for padding, 1 elsewhere; S is the capacity of the cache.
    """

    def attend(heads: Heads, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        at = (jnp.int32(0), jnp.int32(0), jnp.int32(0), index)
        cache = LayerCache(
            jax.lax.dynamic_update_slice(cache.keys, _to_bkht(heads.k), at),
            jax.lax.dynamic_update_slice(cache.values, _to_bkht(heads.v), at),
            heads.recent,
        )
        attended = attention.attention(
            heads.q,
            jnp.moveaxis(cache.keys, 3, 1),
            jnp.moveaxis(cache.values, 3, 1),
            is_causal=True,
            query_segment_ids=jnp.ones(heads.q.shape[:2], jnp.int32),
            key_segment_ids=segment_ids,
            query_offset=index,
        )
        return attended, cache

    return attend


def _to_bkht(x: Float[Array, "B T K H"]) -> Float[Array, "B K H T"]:
    return jnp.moveaxis(x, 1, 3)
