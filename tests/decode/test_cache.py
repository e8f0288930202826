"""A cache keeps what was prefilled, writes in place, and hides what is padding or not yet written."""

import jax
import jax.numpy as jnp
import numpy as np

from rag_mm.decode import cache
from rag_mm.nn.block import Heads
from rag_mm.ops import attention

B, T, K, H = 2, 4, 2, 3


def test_new_tokens_see_the_prompt_and_themselves_and_not_the_padding():
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 1, B, T, K, H)).astype(np.float32)
    segment_ids = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], np.int32)
    (layer,) = cache.make_cache(Heads(None, jnp.asarray(keys), jnp.asarray(values)), 2)
    assert layer.keys.shape == (B, K, H, T + 2)
    q, k, v = rng.normal(size=(3, B, 1, K, H)).astype(np.float32)

    attend = jax.jit(
        lambda index, q, k, v, layer: cache.make_attend(index, segment_ids)(Heads(q, k, v), layer)
    )
    attended, layer = attend(jnp.int32(T), q, k, v, layer)
    written, drawn = (np.moveaxis(x, 3, 1) for x in (layer.keys, layer.values))
    np.testing.assert_array_equal(written[:, :T], keys[0])
    np.testing.assert_array_equal(written[:, T], k[:, 0])
    np.testing.assert_array_equal(drawn[:, T], v[:, 0])
    assert (written[:, T + 1] == 0).all()
    for row, first in ((0, 2), (1, 0)):
        seen = np.concatenate([keys[0], k], 1)[row : row + 1, first:]
        read = np.concatenate([values[0], v], 1)[row : row + 1, first:]
        expected = attention.attention(q[row : row + 1], seen, read, is_causal=False)
        np.testing.assert_allclose(attended[row : row + 1], expected, atol=1e-5)
