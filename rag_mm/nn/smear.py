"""Smeared heads: queries and keys mixed with those of earlier tokens (smeared keys, Olsson et al. 2022)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Recent(NamedTuple):
    """The unsmeared queries and keys of the last W tokens; W is the longest lag."""

    q: Float[Array, "B W N H"]
    k: Float[Array, "B W K H"]


class SmearContext(NamedTuple):
    """Context for smearing.

    Attributes:
        segment_ids: of the tokens in this call.
        recent: heads of the W tokens before this call, zero outside the last token's segment; None at the
            start.
    """

    segment_ids: Int[Array | np.ndarray, "B T"]
    recent: Recent | None = None


def lags_of_dims(
    lags: tuple[tuple[int, ...], ...], num_heads: int, head_dim: int
) -> Int[np.ndarray, "N H"]:
    """The lag of every dimension of every head; 0 if a head has none.

    The first of n entries is for the first num_heads / n heads, and so on. The lags of one entry alternate
    over a head's dimensions; the two that RoPE rotates together (d and d + H / 2) have the same lag.
    """
    pair = np.arange(head_dim) % max(head_dim // 2, 1)
    per_head = [lags[head * len(lags) // num_heads] or (0,) for head in range(num_heads)]
    return np.array([[entry[d % len(entry)] for d in pair] for entry in per_head])


def smear(
    x: Float[Array, "B T N H"],
    recent: Float[Array, "B {width} N H"] | None,
    segment_ids: Int[Array | np.ndarray, "B T"],
    logit_share: Float[Array, " N"],
    lags: Int[np.ndarray, "N H"],
    width: int,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B {width} N H"]]:
    """(1 - share) x[t] + share x[t - lag] per dimension; the second term is 0 outside t's segment.

    If keys are smeared with lag L and queries with lag L - 1, a head compares the token L - 1 before the
    query with the token L before each key, so that a match is at the query's next token. L = 1 finds what
    followed the same token (Olsson et al. 2022); L equal to an image's width in codes finds what was below
    the same code. With several lags a head finds the position where most of them match, since in a uniform
    area of an image one code is not enough.

    Args:
        x: queries or keys.
        recent: the unsmeared queries or keys before x; None at the start.
        segment_ids: segments of x.
        logit_share: share = sigmoid(logit_share).
        lags: at least 0; see `lags_of_dims`.
        width: at least the longest lag.

    Returns:
        The smeared x, and `recent` for the tokens that follow.
    """
    num_tokens = x.shape[1]
    if recent is None:
        extended = jnp.pad(x, ((0, 0), (width, 0), (0, 0), (0, 0)))
    else:
        extended = jnp.concatenate([recent, x], axis=1)
    segments = jnp.pad(segment_ids, ((0, 0), (width, 0)), constant_values=1)
    lagged = jnp.zeros_like(x)
    for lag in np.unique(lags):
        at = slice(width - lag, width - lag + num_tokens)
        is_same = (segments[:, at] == segment_ids)[:, :, None, None]
        mask = is_same & jnp.array(lags == lag)[None, None]
        lagged = lagged + extended[:, at] * mask.astype(x.dtype)
    share = jax.nn.sigmoid(logit_share).astype(x.dtype)[None, None, :, None]
    is_last = (segments[:, -width:] == segment_ids[:, -1:])[:, :, None, None]
    return x * (1 - share) + lagged * share, extended[:, -width:] * is_last.astype(x.dtype)
