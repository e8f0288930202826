"""Positions: rotary (Su et al. 2021, LLaMA's half-split form) and fixed sinusoids (Vaswani et al. 2017)."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """LLaMA 3.1's longer context: slow rotations become `factor` times slower, fast ones stay.

    A wavelength above original_length / low_freq_factor is slow, one below original_length /
    high_freq_factor is fast, and between the two the frequency is blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int  # tokens in the context of pretraining

    def __post_init__(self):
        if not (self.factor > 0 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(
                "rope scaling needs factor > 0 and 0 < low_freq_factor < high_freq_factor, not "
                f"{self.factor}, {self.low_freq_factor} and {self.high_freq_factor}"
            )

    def __call__(self, frequencies: jax.Array) -> jax.Array:
        """float32 [H/2] in radians a position -> the same shape."""
        turns = self.original_length * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        share = jnp.clip((turns - self.low_freq_factor) / span, 0, 1)
        return (1 - share) * frequencies / self.factor + share * frequencies


class Rotation(NamedTuple):
    """Cosines and sines of the angles that positions turn a head's pairs by, float32 [B, T, 1, H/2]."""

    cos: jax.Array
    sin: jax.Array


def make_rotation(
    positions: jax.Array,
    head_dim: int,
    theta: float = 10_000.0,
    scaling: Llama3Scaling | None = None,
) -> Rotation:
    """The angles positions / theta^(2i/H), made once for all layers.

    Args:
        positions: int32 [B, T].
        head_dim: H, even.
        theta: base of the wavelengths.
        scaling: what is done to the frequencies, or None.
    """
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequencies = scaling(frequencies)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    # Without the barrier XLA computes every sine again for each head of each layer.
    return Rotation(*jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles))))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns each head's pairs (i, i + H/2); x: [B, T, N, H], and so is what is returned, in x's dtype."""
    cos, sin = rotation
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
