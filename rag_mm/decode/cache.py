"""The KV cache: written in place at the same index for the whole batch; one array per layer, or for all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rag_mm.core import sharding
from rag_mm.nn.block import Attend, Block, ContextHeads, Heads
from rag_mm.nn.decoder import Decoder, DecoderConfig
from rag_mm.nn.smear import Recent
from rag_mm.ops import attention

# A CPU cannot multiply with a layer's slice of stacked weights without copying it: scanned layers take 1.2 to
# 2 x the time per token of unrolled ones (one sequence, widths 192 and 1,024), but each unrolled layer adds
# 0.25 s of an idle CPU to the compilation. Up to MAX_UNROLLED layers that is 2 s. Deeper models are scanned
# while all steps of a call copy at most MAX_COPIED bytes per layer, which takes about a quarter of that time.
MAX_UNROLLED, MAX_COPIED = 8, 5 * 10**8


class LayerCache(NamedTuple):
    """Keys and values of one layer, or of all with a leading axis L; `recent` as in `nn.block.Heads`.

    `read` are those of a context, if there is one, in the same layout.

    The layout suits products with a single query: with [B, S, K, H], XLA would transpose the whole cache for
    every token.
    """

    keys: Float[Array, "*L B K H S"]
    values: Float[Array, "*L B K H S"]
    recent: Recent | None = None
    read: tuple[jax.Array, jax.Array, jax.Array | None] | None = None

    @property
    def context(self) -> ContextHeads | None:
        """The context's keys and values, as attention reads them."""
        if self.read is None:
            return None
        keys, values, mask = self.read
        return ContextHeads(jnp.moveaxis(keys, -1, -3), jnp.moveaxis(values, -1, -3), mask)


Cache = LayerCache | tuple[LayerCache, ...]


def make_cache(prefilled: Heads, num_steps: int, is_scanned: bool = False) -> Cache:
    """Caches with room for `num_steps` tokens after the prompt, from `Decoder.prefill`'s [L, B, T, K, H].

    Returns:
        One cache per layer, or with `is_scanned` one of stacked arrays.
    """
    if is_scanned:
        return _make_cache(prefilled, num_steps)
    layers = range(prefilled.k.shape[0])
    return tuple(
        _make_cache(jax.tree.map(lambda leaf, i=i: leaf[i], prefilled), num_steps) for i in layers
    )


def make_attend(
    index: Int[Array, ""], segment_ids: Int[Array | np.ndarray, "B S"], is_scanned: bool = False
) -> Attend:
    """Attention of new tokens, one or more per example: writes them to the cache; each attends up to itself.

    Args:
        index: of the first new token, the same for all examples, since prompts are padded on the left.
        segment_ids: 0 for padding, 1 elsewhere; S is the capacity of the cache.
        is_scanned: return the new tokens' entry alone, which `write` puts into the stacked cache. A scan
            would otherwise copy the whole cache for every token.
    """

    def attend(heads: Heads, cache: LayerCache) -> tuple[jax.Array, LayerCache]:
        entry = _make_cache(heads._replace(context=None), 0)
        cache = write(cache, entry, index)
        attended = attention.attention(
            heads.q,
            jnp.moveaxis(cache.keys, 3, 1),
            jnp.moveaxis(cache.values, 3, 1),
            is_causal=True,
            query_segment_ids=jnp.ones(heads.q.shape[:2], jnp.int32),
            key_segment_ids=segment_ids,
            query_offset=index,
        )
        return attended, entry if is_scanned else cache

    return attend


def write(cache: LayerCache, entry: LayerCache, index: Int[Array, ""]) -> LayerCache:
    """The cache with an entry, of any S, at `index` and after it."""
    at = (jnp.int32(0),) * (cache.keys.ndim - 1) + (index,)
    return LayerCache(
        jax.lax.dynamic_update_slice(cache.keys, entry.keys, at),
        jax.lax.dynamic_update_slice(cache.values, entry.values, at),
        entry.recent,
        cache.read,
    )


def layers_of(
    model: Decoder, shape: tuple[int, int, int], is_scanned: bool | None
) -> tuple[Block | tuple[Block, ...], bool]:
    """The layers as `Decoder.decode_step` takes them, and whether it scans them.

    Args:
        model: the decoder.
        shape: sequences, all streams together; tokens of the longest prompt; tokens to sample.
        is_scanned: None: where that is faster (`scans_layers`).
    """
    if is_scanned is None:
        batch_size, length, num_steps = shape
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.stack.blocks))
        layer_bytes = weights // model.config.num_layers
        capacity = length + num_steps
        is_scanned = scans_layers(model.config, layer_bytes, batch_size, capacity, num_steps)
    return model.stack.blocks if is_scanned else model.stack.unstack(), is_scanned


def scans_layers(
    config: DecoderConfig, layer_bytes: int, batch_size: int, length: int, num_steps: int
) -> bool:
    """Whether a decoding program should scan the layers of its step instead of unrolling them.

    Args:
        config: the decoder's.
        layer_bytes: size of one layer's parameters.
        batch_size: sequences, all streams together.
        length: capacity of the cache.
        num_steps: tokens to sample.
    """
    if sharding.platform() != "cpu" or config.num_layers <= MAX_UNROLLED:
        return False
    heads = config.block.num_kv_heads * config.block.head_dim
    cached = 2 * batch_size * length * heads * jnp.dtype(config.dtype).itemsize
    return num_steps * (layer_bytes + cached) < MAX_COPIED


def _make_cache(heads: Heads, num_steps: int) -> LayerCache:
    padding = ((0, 0),) * (heads.k.ndim - 1) + ((0, num_steps),)
    keys, values = (jnp.moveaxis(x, -3, -1) for x in (heads.k, heads.v))
    if num_steps:
        keys, values = jnp.pad(keys, padding), jnp.pad(values, padding)
    read = None
    if heads.context is not None:
        k, v, mask = heads.context
        read = jnp.moveaxis(k, -3, -1), jnp.moveaxis(v, -3, -1), mask
    return LayerCache(keys, values, heads.recent, read)
