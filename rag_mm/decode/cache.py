"""The KV cache: one pair of arrays a layer, written in place at the next index of every row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rag_mm.nn.block import Attend, Heads
from rag_mm.nn.smear import Recent
from rag_mm.ops import attention


class LayerCache(NamedTuple):
    """Keys and values of a layer, each [B, capacity, K, H]; `recent` as in `nn.block.Heads`."""

    keys: jax.Array
    values: jax.Array
    recent: Recent | None = None


def make_cache(prefilled: Heads, num_steps: int) -> tuple[LayerCache, ...]:
    """Room for `num_steps` more tokens behind what `Decoder.prefill` returned ([L, B, T, K, H])."""
    room = ((0, 0), (0, num_steps), (0, 0), (0, 0))
    keys, values, recent = prefilled.k, prefilled.v, prefilled.recent
    return tuple(
        LayerCache(
            jnp.pad(keys[i], room),
            jnp.pad(values[i], room),
            None if recent is None else Recent(recent.q[i], recent.k[i]),
        )
        for i in range(keys.shape[0])
    )


def make_attend(index: jax.Array, segment_ids: jax.Array) -> Attend:
    """How one new token attends: it is written at `index`, then sees all that stands before.

    Args:
        index: int32 [], the same in every row (prompts are padded on the left).
        segment_ids: int32 [B, capacity], 0 for padding, 1 elsewhere.
    """

    def attend(heads: Heads, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        at = (jnp.int32(0), index, jnp.int32(0), jnp.int32(0))
        cache = LayerCache(
            jax.lax.dynamic_update_slice(cache.keys, heads.k, at),
            jax.lax.dynamic_update_slice(cache.values, heads.v, at),
            heads.recent,
        )
        attended = attention.attention(
            heads.q,
            cache.keys,
            cache.values,
            is_causal=True,
            query_segment_ids=jnp.ones(heads.q.shape[:2], jnp.int32),
            key_segment_ids=segment_ids,
            query_offset=index,
        )
        return attended, cache

    return attend
