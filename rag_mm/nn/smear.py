"""Heads that look back: queries and keys mixed with earlier tokens' (smeared keys, Olsson et al. 2022)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Recent(NamedTuple):
    """The last queries and keys before smearing, each [B, W, N, H] with W the longest lag."""

    q: jax.Array
    k: jax.Array


class SmearContext(NamedTuple):
    """What smearing must know of the past: each token's segment, int32 [B, T], and what stands right before
    the first token in the last one's segment; None where nothing does."""

    segment_ids: jax.Array
    recent: Recent | None = None


def lags_of_dims(lags: tuple[tuple[int, ...], ...], num_heads: int, head_dim: int) -> np.ndarray:
    """The lag of every dimension of every head, int [N, H]; 0 where a head has none.

    The first of n entries belongs to the first num_heads / n heads, and so on. The lags of one entry share
    a head's dimensions in turn, and the two that RoPE turns together (d and d + H / 2) have the same one.
    """
    pair = np.arange(head_dim) % max(head_dim // 2, 1)
    own = [lags[head * len(lags) // num_heads] or (0,) for head in range(num_heads)]
    return np.array([[each[d % len(each)] for d in pair] for each in own])


def smear(
    x: jax.Array,
    recent: jax.Array | None,
    segment_ids: jax.Array,
    logit_share: jax.Array,
    lags: np.ndarray,
    width: int,
) -> tuple[jax.Array, jax.Array]:
    """(1 - share) x[t] + share x[t - lag], dimension by dimension, where t - lag is of the same segment.

    Where keys look back by L and queries by L - 1, a head compares the token L - 1 before the query with
    those L before each key: what it finds stands where the query's next token is wanted. L = 1 finds what
    followed the same token (Olsson et al. 2022), L an image's width in codes what stood below the same
    code. With several lags a head finds the place where most of them agree, which one code of a plain
    area cannot tell.

    Args:
        x: [B, T, N, H], queries or keys.
        recent: [B, width, N, H], what stood before x; None is nothing.
        segment_ids: int32 [B, T].
        logit_share: float32 [N], share = sigmoid(logit_share).
        lags: int [N, H], at least 0; see `lags_of_dims`.
        width: at least the longest lag.

    Returns:
        The smeared x, and the `recent` of what comes after it.
    """
    num_tokens = x.shape[1]
    if recent is None:
        whole = jnp.pad(x, ((0, 0), (width, 0), (0, 0), (0, 0)))
    else:
        whole = jnp.concatenate([recent, x], axis=1)
    segments = jnp.pad(segment_ids, ((0, 0), (width, 0)), constant_values=1)
    lagged = jnp.zeros_like(x)
    for lag in np.unique(lags):
        at = slice(width - lag, width - lag + num_tokens)
        is_same = (segments[:, at] == segment_ids)[:, :, None, None]
        lagged = lagged + whole[:, at] * (is_same & jnp.array(lags == lag)[None, None]).astype(
            x.dtype
        )
    share = jax.nn.sigmoid(logit_share).astype(x.dtype)[None, None, :, None]
    is_last = (segments[:, -width:] == segment_ids[:, -1:])[:, :, None, None]
    return x * (1 - share) + lagged * share, whole[:, -width:] * is_last.astype(x.dtype)
