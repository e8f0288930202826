"""Quantizing by as many words as a language model has: no array of all distances."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from rag_mm.ops import quantize

MIB = 2**20
NUM_WORDS, DIM = 65_536, 128


@pytest.mark.parametrize("batch_size", [1, 16])
def test_distances_to_65k_words_are_computed_in_parts(batch_size):
    """16 images of 256 positions have 1 GiB of distances; no array of the program is above 256 MiB."""
    grids = tuple((side, side) for side in (1, 2, 4, 8, 16, 16))
    z = jax.ShapeDtypeStruct((batch_size, 16, 16, DIM), jnp.float32)
    codebook = jax.ShapeDtypeStruct((NUM_WORDS, DIM), jnp.float32)
    compiled = jax.jit(lambda z, codebook: quantize.quantize(z, codebook, grids)).lower(z, codebook)
    compiled = compiled.compile()
    sizes = [
        4 * math.prod(map(int, dims.split(",")))
        for dims in re.findall(r"[fs]32\[([\d,]+)\]", compiled.as_text())
    ]
    assert 4 * NUM_WORDS * DIM in sizes and max(sizes) <= 256 * MIB
    assert compiled.memory_analysis().temp_size_in_bytes <= 400 * MIB
