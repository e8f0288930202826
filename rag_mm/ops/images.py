"""Image arrays: uint8 and float32 forms, and the flips and quarter turns of training."""

import jax
import jax.numpy as jnp


def to_float(pixels: jax.Array) -> jax.Array:
    """uint8 0..255 -> float32 0..1, of any shape."""
    return pixels.astype(jnp.float32) / 255


def to_uint8(images: jax.Array) -> jax.Array:
    """float32 -> uint8 by rounding, values outside 0..1 clipped; inverse of to_float."""
    return jnp.round(jnp.clip(images, 0, 1) * 255).astype(jnp.uint8)


def random_flip_rotate(images: jax.Array, rng: jax.Array) -> jax.Array:
    """Each image [B, S, S, 3] in one of the eight flips and quarter turns of a square.

    On emoji scenes it is worth 0.1 dB on unseen classes; pictures of a world with an up and
    a down are better left as they are.
    """
    is_moved = jax.random.bernoulli(rng, shape=(3, images.shape[0], 1, 1, 1))
    images = jnp.where(is_moved[0], images[:, ::-1], images)
    images = jnp.where(is_moved[1], images[:, :, ::-1], images)
    return jnp.where(is_moved[2], images.swapaxes(1, 2), images)
