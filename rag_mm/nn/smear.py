"""Heads that look back: queries and keys mixed with earlier tokens' (smeared keys, Olsson et al. 2022)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Recent(NamedTuple):
    """The last queries and keys before smearing, each [B, W, N, H] with W the longest lag."""

    q: jax.Array
    k: jax.Array


class Before(NamedTuple):
    """What smearing must know of the past: each token's segment, int32 [B, T], and what stands right before
    the first token in the last one's segment; None where nothing does."""

    segment_ids: jax.Array
    recent: Recent | None = None


def lag_of_head(lags: tuple[int, ...], num_heads: int) -> list[int]:
    """The first of n lags belongs to the first num_heads / n heads, and so on."""
    return [lags[head * len(lags) // num_heads] for head in range(num_heads)]


def smear(
    x: jax.Array,
    recent: jax.Array | None,
    segment_ids: jax.Array,
    logit_share: jax.Array,
    lags: tuple[int, ...],
    width: int,
) -> tuple[jax.Array, jax.Array]:
    """(1 - share) x[t] + share x[t - lag], where t - lag is of the same segment.

    A head with lag L compares the token L - 1 before the query with those L before each key: what it finds
    stands where the query's next token is wanted. L = 1 finds what followed the same token (Olsson et al.
    2022), L an image's width in codes what stood below the same code; a head with lag 0 stays as it is.

    Args:
        x: [B, T, N, H], queries or keys.
        recent: [B, width, N, H], what stood before x; None is nothing.
        segment_ids: int32 [B, T].
        logit_share: float32 [N], share = sigmoid(logit_share).
        lags: at least 0; see `lag_of_head`.
        width: at least the longest lag.

    Returns:
        The smeared x, and the `recent` of what comes after it.
    """
    num_tokens, num_heads = x.shape[1:3]
    if recent is None:
        whole = jnp.pad(x, ((0, 0), (width, 0), (0, 0), (0, 0)))
    else:
        whole = jnp.concatenate([recent, x], axis=1)
    segments = jnp.pad(segment_ids, ((0, 0), (width, 0)), constant_values=1)
    own_lag = np.array(lag_of_head(lags, num_heads))
    lagged = jnp.zeros_like(x)
    for lag in sorted(set(lags)):
        at = slice(width - lag, width - lag + num_tokens)
        is_same = (segments[:, at] == segment_ids)[:, :, None, None]
        is_own = jnp.array(own_lag == lag)[None, None, :, None]
        lagged = lagged + whole[:, at] * (is_same & is_own).astype(x.dtype)
    share = jax.nn.sigmoid(logit_share).astype(x.dtype)[None, None, :, None]
    is_last = (segments[:, -width:] == segment_ids[:, -1:])[:, :, None, None]
    return x * (1 - share) + lagged * share, whole[:, -width:] * is_last.astype(x.dtype)
