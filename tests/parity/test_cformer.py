"""Emu's causal transformer matches the decoder stack of transformers' T5, from random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.models.emu import cformer
from rag_mm.models.emu.emu_config import CFormerConfig
from rag_mm.nn import param_trees

pytestmark = pytest.mark.parity

# More queries than exact buckets, so that a far one is in a range.
CONFIG = CFormerConfig(12, 3, 24, 3, 10, 40, num_buckets=8, max_distance=10)
WIDTH, OUT, TOKENS = 14, 20, 9
BLOCK = "block.{}.layer."
NAMES = {
    "queries": "causal_tokens",
    "relative_bias": "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "norm/scale": "final_layer_norm.weight",
    "output/kernel": "projection.weight",
    "output/bias": "projection.bias",
    "blocks/attention_norm/scale": BLOCK + "0.layer_norm.weight",
    "blocks/cross_norm/scale": BLOCK + "1.layer_norm.weight",
    "blocks/mlp_norm/scale": BLOCK + "2.layer_norm.weight",
    "blocks/up/kernel": BLOCK + "2.DenseReluDense.wi.weight",
    "blocks/down/kernel": BLOCK + "2.DenseReluDense.wo.weight",
} | {
    f"blocks/{ours}/{a}/kernel": f"{BLOCK}{theirs}.{b}.weight"
    for ours, theirs in (("attention", "0.SelfAttention"), ("cross_attention", "1.EncDecAttention"))
    for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))
}


def theirs():
    """T5's decoder whose cross-attention reads vectors of another width, and Emu's projection of it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=4,
        d_model=24,
        d_kv=10,
        d_ff=40,
        num_layers=3,
        num_decoder_layers=3,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        dropout_rate=0.1,
        feed_forward_proj="relu",
        is_gated_act=False,
    )
    stack = transformers.T5ForConditionalGeneration(config).decoder.eval()
    for block in stack.block:
        attention = block.layer[1].EncDecAttention
        for name in ("k", "v"):
            setattr(attention, name, torch.nn.Linear(WIDTH, 30, bias=False))
    projection = torch.nn.Linear(24, OUT)
    with torch.no_grad():
        for weight in stack.parameters():
            scale = 0.3 if weight.ndim == 1 else weight.shape[1] ** -0.5
            weight.copy_(scale * torch.randn(weight.shape) + float(weight.ndim == 1))
    queries = torch.randn(1, 12, 24)
    return torch, stack, projection, queries


def test_vectors_of_images_are_those_of_t5s_decoder():
    torch, stack, projection, queries = theirs()
    tokens = np.random.default_rng(0).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)
    with torch.no_grad():
        hidden = stack(
            inputs_embeds=queries.expand(2, -1, -1),
            encoder_hidden_states=torch.tensor(tokens),
            use_cache=False,
        ).last_hidden_state
        expected = projection(hidden)
    given = {name: weight.numpy() for name, weight in stack.state_dict().items()}
    given |= {
        "causal_tokens": queries[0].numpy(),
        "projection.weight": projection.weight.detach().numpy(),
        "projection.bias": projection.bias.detach().numpy(),
    }
    make = lambda: cformer.CFormer(CONFIG, WIDTH, OUT, rngs=nnx.Rngs(0))
    graphdef, abstract = param_trees.describe(make, None)

    def convert(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        layers = range(leaf.shape[0]) if "{}" in NAMES[name] else [0]
        sources = [given[NAMES[name].format(i)] for i in layers]
        weights = [s.T if name.endswith("kernel") else s for s in sources]
        return jnp.asarray(np.stack(weights).reshape(leaf.shape))

    params = jax.tree_util.tree_map_with_path(convert, abstract)
    found = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, tokens)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    assert float(np.std(expected.numpy())) > 0.1
