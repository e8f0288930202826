"""Image arrays: conversion between uint8 and float32, random flips and rotations, images per batch."""

import jax
import jax.numpy as jnp
import numpy as np

from rag_mm.ops import images as image_ops


def test_random_flips_and_rotations_are_the_eight_symmetries_of_a_square():
    image = jnp.asarray(np.random.default_rng(0).integers(256, size=(1, 16, 16, 3)), jnp.uint8)
    transformed = np.asarray(
        image_ops.random_flip_rotate(jnp.repeat(image, 64, axis=0), jax.random.key(0))
    )
    symmetries = {
        np.rot90(side, k).tobytes() for side in (image[0], image[0][::-1]) for k in range(4)
    }
    assert len(symmetries) == 8
    assert {image.tobytes() for image in transformed} == symmetries


def test_uint8_to_float_and_back_is_the_identity():
    pixels = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_array_equal(image_ops.to_uint8(image_ops.to_float(pixels)), pixels)
    assert image_ops.to_uint8(jnp.array([-1.0, 2.0])).tolist() == [0, 255]


def test_a_batch_has_about_a_quarter_of_a_million_pixels():
    sizes = (8, 32, 64, 128, 224, 256, 336, 512, 4096)
    assert [image_ops.num_at_once(size) for size in sizes] == [256, 256, 64, 16, 4, 4, 2, 1, 1]
