"""FLOPs counted in a trace are those counted by hand."""

import jax
import jax.numpy as jnp
from flax import nnx

from rag_mm.models import clip
from rag_mm.perf import traced_flops


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_products_and_convolutions_by_hand():
    assert traced_flops.count(lambda a, b: a @ b, spec(3, 5), spec(5, 7)) == 2 * 3 * 5 * 7
    batched = lambda a, b: jnp.einsum("bij,bkj->bik", a, b)
    assert traced_flops.count(batched, spec(2, 3, 5), spec(2, 7, 5)) == 2 * 2 * 3 * 5 * 7
    convolve = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # A 4 x 4 grid of outputs, each from 3 x 3 x 6 numbers.
    assert traced_flops.count(convolve, spec(1, 8, 8, 6), spec(3, 3, 6, 10)) == 2 * 16 * 10 * 54


def test_what_runs_several_times_counts_as_often():
    w = spec(4, 4)
    step = lambda carry, each: (carry @ each, None)
    scanned = lambda x, ws: jax.lax.scan(step, x, ws)[0]
    assert traced_flops.count(scanned, w, spec(6, 4, 4)) == 6 * 2 * 4**3
    either = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)
    assert traced_flops.count(jax.jit(either), w) == 2 * 2 * 4**3


def test_a_vision_transformer_by_hand():
    """Two layers of width 32 on 4 patches and the class token."""
    towers = clip.TowerConfig(32, 2, 2, 64)
    config = clip.CLIPConfig(8, 4, towers, towers, 100, 6, 99, 16)
    model = clip.CLIP(config, rngs=nnx.Rngs(params=0))
    layer = 5 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 5 * 5 * 32  # Weights, then scores and values.
    patches, projection = 4 * (4 * 4 * 3) * 32, 32 * 16
    images = spec(1, 8, 8, 3)
    assert traced_flops.count(model.encode_image, images) == 2 * (2 * layer + patches + projection)
