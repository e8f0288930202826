"""Positions: rotary (Su et al. 2021, LLaMA's half-split form) and fixed sinusoids (Vaswani et al. 2017)."""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, theta: float = 10_000.0) -> jax.Array:
    """Rotates each head's pairs (i, i + H/2) by positions / theta^(2i/H).

    Args:
        x: [B, T, N, H], H even.
        positions: int32 [B, T].
        theta: base of the wavelengths.

    Returns:
        Array of x's shape and dtype; angles are computed in float32.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def sinusoids(positions: jax.Array, dim: int) -> jax.Array:
    """Fixed position vectors.

    Args:
        positions: int32 [B, T].
        dim: width D, even.

    Returns:
        float32 [B, T, D]: sines in the first half, cosines in the second.
    """
    half = dim // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1))
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
