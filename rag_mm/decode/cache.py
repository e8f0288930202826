"""The KV cache: one pair of arrays a layer, written in place at the next index of every row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rag_mm.nn.block import Attend, Heads
from rag_mm.nn.smear import Recent
from rag_mm.ops import attention


class LayerCache(NamedTuple):
    """Keys and values of a layer, each [B, K, H, capacity]; `recent` as in `nn.block.Heads`.

    Products with one query want them so: kept as they come, XLA would turn the whole cache at every token.
    """

    keys: jax.Array
    values: jax.Array
    recent: Recent | None = None


def make_cache(prefilled: Heads, num_steps: int) -> tuple[LayerCache, ...]:
    """Room for `num_steps` more tokens behind what `Decoder.prefill` returned ([L, B, T, K, H])."""
    room = ((0, 0), (0, 0), (0, 0), (0, num_steps))
    keys, values, recent = prefilled.k, prefilled.v, prefilled.recent
    return tuple(
        LayerCache(
            jnp.pad(_turn(keys[i]), room),
            jnp.pad(_turn(values[i]), room),
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
        at = (jnp.int32(0), jnp.int32(0), jnp.int32(0), index)
        cache = LayerCache(
            jax.lax.dynamic_update_slice(cache.keys, _turn(heads.k), at),
            jax.lax.dynamic_update_slice(cache.values, _turn(heads.v), at),
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


def _turn(x: jax.Array) -> jax.Array:
    """[B, T, K, H] -> [B, K, H, T]."""
    return jnp.moveaxis(x, 1, 3)
