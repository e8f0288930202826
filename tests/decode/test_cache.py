"""The KV cache: keeps the prompt, writes new tokens in place, masks padding and unwritten positions."""

import jax
import jax.numpy as jnp
import numpy as np

from rag_mm.decode import cache
from rag_mm.nn.block import Heads
from rag_mm.ops import attention

B, T, K, H = 2, 4, 2, 3


def test_a_new_token_attends_to_the_prompt_and_itself_but_not_to_padding():
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
    cached_keys, cached_values = (np.moveaxis(x, 3, 1) for x in (layer.keys, layer.values))
    np.testing.assert_array_equal(cached_keys[:, :T], keys[0])
    np.testing.assert_array_equal(cached_keys[:, T], k[:, 0])
    np.testing.assert_array_equal(cached_values[:, T], v[:, 0])
    assert (cached_keys[:, T + 1] == 0).all()
    for example, first in ((slice(0, 1), 2), (slice(1, 2), 0)):
        visible_keys = np.concatenate([keys[0], k], 1)[example, first:]
        visible_values = np.concatenate([values[0], v], 1)[example, first:]
        expected = attention.attention(q[example], visible_keys, visible_values, is_causal=False)
        np.testing.assert_allclose(attended[example], expected, atol=1e-5)
