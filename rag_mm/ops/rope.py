"""Rotary positions (Su et al. 2021, in LLaMA's half-split form) and sinusoids (Vaswani et al. 2017)."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """LLaMA 3.1's context extension: divides low frequencies by `factor` and keeps high ones.

    Low are the frequencies of wavelengths above original_length / low_freq_factor, high those of wavelengths
    below original_length / high_freq_factor. Between the two the result is interpolated.
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

    def __call__(self, frequencies: Float32[Array, " half"]) -> Float32[Array, " half"]:
        """Scales frequencies, in radians per position."""
        turns = self.original_length * frequencies / (2 * math.pi)
        span = self.high_freq_factor - self.low_freq_factor
        share = jnp.clip((turns - self.low_freq_factor) / span, 0, 1)
        return (1 - share) * frequencies / self.factor + share * frequencies


class Rotation(NamedTuple):
    """Cosines and sines of the angles by which positions rotate the pairs of a head."""

    cos: Float32[Array, "B T 1 half"]
    sin: Float32[Array, "B T 1 half"]


def make_rotation(
    positions: Int[Array | np.ndarray, "B T"],
    head_dim: int,
    theta: float = 10_000.0,
    scaling: Llama3Scaling | None = None,
) -> Rotation:
    """The angles positions / theta^(2i/H), computed once for all layers.

    Args:
        positions: token positions.
        head_dim: H, even.
        theta: base of the wavelengths.
        scaling: changes the frequencies for a longer context.
    """
    half = head_dim // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None:
        frequencies = scaling(frequencies)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    # Without the barrier XLA recomputes every sine for each head of each layer.
    return Rotation(*jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles))))


def rotate(x: Float[Array | np.ndarray, "B T N H"], rotation: Rotation) -> Float[Array, "B T N H"]:
    """Rotates each head's pairs (i, i + H/2); returns x's dtype."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def sinusoids(positions: Int[Array | np.ndarray, "B T"], dim: int) -> Float32[Array, "B T {dim}"]:
    """Fixed position embeddings of even width: sines in the first half, cosines in the second."""
    half = dim // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / max(half - 1, 1))
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
