"""LoRA: the start is the base, merging changes no output, A and B are split like the kernel beside them."""

import functools

import jax
import jax.numpy as jnp
import naive_decoder
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.models import chameleon, vqgan
from rag_mm.nn import decoder, layers, lora, param_trees
from rag_mm.nn.block import Context

SIZES = dict(
    vocab_size=16, num_layers=2, embed_dim=8, num_heads=4, num_kv_heads=2, mlp_dim=12, max_seq_len=6
)
PLAIN = decoder.DecoderConfig(**SIZES, use_bias=True, smear_lags=((1,), ()))
LLAMA = decoder.DecoderConfig(**SIZES)
CHAMELEON = decoder.DecoderConfig(
    **SIZES, qk_norm=True, qk_norm_kind="layernorm_per_head", post_norm=True
)
EVERYWHERE = lora.LoRAConfig(rank=2, alpha=8.0, targets=("attention/*", "gate", "up", "down"))
TOKENS = np.random.default_rng(0).integers(16, size=(2, 6)).astype(np.int32)
POSITIONS = np.tile(np.arange(6, dtype=np.int32), (2, 1))


def make_lora_model(base, config):
    return lora.add(naive_decoder.make_model(base), config, rngs=nnx.Rngs(params=1))


@functools.cache
def random_params(base, config):
    """Structure and random parameters, also of B."""
    graphdef, abstract = param_trees.describe(lambda: make_lora_model(base, config), None)
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), abstract
    )


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef, params):
    model = nnx.merge(graphdef, params)
    return model.logits(model(TOKENS, POSITIONS, jnp.ones_like(TOKENS)))


def make_linear(key=None):
    rngs = nnx.Rngs(params=0 if key is None else key)
    return layers.Linear((4,), (2, 3), ("embed", "heads", None), use_bias=True, rngs=rngs)


def test_a_fresh_update_is_zero_and_takes_over_the_map():
    linear = make_linear()
    made = lora.LoRALinear(linear, EVERYWHERE, rngs=nnx.Rngs(params=1))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)
    np.testing.assert_array_equal(made(x), linear(x))
    assert made.kernel is linear.kernel and made.bias is linear.bias
    assert made.lora_a.shape == (4, 2) and made.lora_b.shape == (2, 2, 3)
    assert np.asarray(made.lora_a[...]).std() == pytest.approx(0.5, rel=0.5)
    assert not np.asarray(made.lora_b[...]).any()


def test_in_a_stack_every_layer_has_its_own_update():
    stack = nnx.Dict(blocks=jax.vmap(make_linear)(jax.random.split(jax.random.key(0), 3)))
    made = lora.add(stack, lora.LoRAConfig(rank=2, targets=("blocks",)), rngs=nnx.Rngs(params=1))
    a, b = np.asarray(made["blocks"].lora_a[...]), made["blocks"].lora_b
    assert a.shape == (3, 4, 2) and b.shape == (3, 2, 2, 3)
    assert not np.array_equal(a[0], a[1])


def test_a_model_with_fresh_updates_is_the_base():
    graphdef, params = random_params(PLAIN, EVERYWHERE)
    a, rest = param_trees.split(params, lambda path: path.endswith(lora.A))
    b, base = param_trees.split(rest, lambda path: path.endswith(lora.B))
    fresh = param_trees.join(param_trees.join(base, a), jax.tree.map(jnp.zeros_like, b))
    plain = param_trees.describe(lambda: naive_decoder.make_model(PLAIN), None)[0]
    assert len(jax.tree.leaves(a)) == len(jax.tree.leaves(b)) == 7
    # One map gives the same bits; a compiler rounds the two programs differently.
    np.testing.assert_allclose(logits(graphdef, fresh), logits(plain, base), atol=1e-6)


@pytest.mark.parametrize("base", [PLAIN, LLAMA, CHAMELEON], ids=["plain", "llama", "chameleon"])
def test_merged_parameters_give_the_same_outputs(base):
    graphdef, params = random_params(base, EVERYWHERE)
    merged = lora.merge(params, EVERYWHERE)
    plain, abstract = param_trees.describe(lambda: naive_decoder.make_model(base), None)
    assert jax.tree.structure(merged) == jax.tree.structure(abstract)
    expected = logits(graphdef, params)
    np.testing.assert_allclose(logits(plain, merged), expected, atol=2e-5)
    without = param_trees.split(params, lora.is_added)[1]
    assert np.abs(logits(plain, without) - expected).max() > 0.1


def test_cross_attention_is_a_target_of_its_own():
    """`cross_attention/*` is it alone, `attention/*` is without it, and a bare name is in both."""
    reading = decoder.DecoderConfig(**SIZES, context_dim=6)
    config = lora.LoRAConfig(rank=2, targets=("cross_attention/*",))
    graphdef, params = random_params(reading, config)
    changed = lambda tree: {
        path.rpartition("/")[0].removeprefix("stack/blocks/")
        for path in param_trees.leaves_by_path(param_trees.split(tree, lora.is_added)[0])
    }
    assert changed(params) == {f"cross_attention/{name}" for name in ("q", "k", "v", "out")}
    for target, expected in {
        "attention/q": {"attention/q"},
        "q": {"attention/q", "cross_attention/q"},
    }.items():
        found = param_trees.describe(
            lambda target=target: make_lora_model(reading, lora.LoRAConfig(targets=(target,))), None
        )
        assert changed(found[1]) == expected
    context = Context(np.random.default_rng(1).normal(size=(2, 3, 6)).astype(np.float32))
    hidden = jax.jit(
        lambda graphdef, p: nnx.merge(graphdef, p)(TOKENS, POSITIONS, None, context),
        static_argnums=0,
    )
    plain, _ = param_trees.describe(lambda: naive_decoder.make_model(reading), None)
    expected = hidden(graphdef, params)
    np.testing.assert_allclose(hidden(plain, lora.merge(params, config)), expected, atol=2e-5)
    base = param_trees.split(params, lora.is_added)[1]
    assert np.abs(hidden(plain, base) - expected).max() > 0.1


def test_a_merged_kernel_is_the_papers_sum():
    _, params = random_params(PLAIN, EVERYWHERE)
    before = jax.device_get(params["stack"]["blocks"])
    after = jax.device_get(lora.merge(params, EVERYWHERE)["stack"]["blocks"])
    for layer in range(2):
        down = {k: v[layer] for k, v in before["mlp"]["down"].items()}
        update = 8 / 2 * down["lora_a"] @ down["lora_b"]
        found = after["mlp"]["down"]["kernel"][layer]
        np.testing.assert_allclose(found, down["kernel"] + update, rtol=1e-5, atol=1e-6)
        out = {k: v[layer] for k, v in before["attention"]["out"].items()}
        update = 4 * np.einsum("nhr,rd->nhd", out["lora_a"], out["lora_b"])
        found = after["attention"]["out"]["kernel"][layer]
        np.testing.assert_allclose(found, out["kernel"] + update, rtol=1e-5, atol=1e-6)


def test_dropped_inputs_are_of_the_updates_alone_and_average_out():
    config = lora.LoRAConfig(rank=2, alpha=2.0, targets=("blocks",), dropout=0.5)
    stack = nnx.Dict(blocks=jax.vmap(make_linear)(jax.random.split(jax.random.key(0), 3)))
    made = lora.add(stack, config, rngs=nnx.Rngs(params=1))["blocks"]
    made.lora_b[...] = jnp.ones_like(made.lora_b[...])
    x = jnp.ones((4, 500, 4))
    graphdef, params = nnx.split(made)

    @functools.partial(jax.jit, static_argnums=0)
    def run(drops, key):
        model = nnx.merge(graphdef, params)
        whole = nnx.Dict(blocks=model)
        if drops:
            lora.start_dropout(whole, key)
        return jax.lax.scan(
            lambda _, layer: (None, layer(x) - layers.Linear.__call__(layer, x)), None, model
        )[1]

    still, found = run(False, jax.random.key(0)), run(True, jax.random.key(0))
    np.testing.assert_array_equal(found, run(True, jax.random.key(0)))
    assert np.abs(found - run(True, jax.random.key(1))).max() > 0.1
    # Each layer drops others, and half of the inputs on average, so that the rest counts twice.
    assert np.abs(found[0] - found[1] * (still[0] / still[1])).max() > 0.1
    np.testing.assert_allclose(found.mean((1, 2)), still.mean((1, 2)), atol=0.15)
    with pytest.raises(ValueError, match="dropout"):
        lora.LoRAConfig(dropout=1.0)


def test_a_loss_without_dropout_has_the_same_bits():
    model = lora.add(
        nnx.Dict(map=make_linear(0)), lora.LoRAConfig(targets=("map",)), rngs=nnx.Rngs(0)
    )
    loss = lambda model, batch, rng: (model["map"](batch), jax.random.uniform(rng))
    for ours, theirs in zip(
        lora.with_dropout(loss)(model, jnp.ones((1, 2, 4)), jax.random.key(3)),
        loss(model, jnp.ones((1, 2, 4)), jax.random.key(3)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_and_b_are_split_like_the_kernel_beside_them():
    mesh = sharding.make_mesh(2, 2, 2)
    _, abstract = param_trees.describe(lambda: make_lora_model(LLAMA, EVERYWHERE), mesh)
    specs = {
        path: leaf.sharding.spec for path, leaf in param_trees.leaves_by_path(abstract).items()
    }
    blocks = "stack/blocks"
    assert specs[f"{blocks}/attention/q/lora_a"] == P(None, "fsdp", None)
    assert specs[f"{blocks}/attention/q/lora_b"] == P(None, None, "tensor", None)
    assert specs[f"{blocks}/attention/out/lora_a"] == P(None, "tensor", None, None)
    assert specs[f"{blocks}/attention/out/lora_b"] == P(None, None, "fsdp")
    assert specs[f"{blocks}/mlp/down/lora_a"] == P(None, "tensor", None)


def test_targets_are_names_or_patterns_also_inside_a_larger_model():
    config = chameleon.ChameleonConfig(
        CHAMELEON, vqgan.VQGANConfig(image_size=32, width=32, codebook_size=4), tuple(range(4))
    )

    def make():
        model = chameleon.Chameleon(config, rngs=nnx.Rngs(0))
        return lora.add(model, lora.LoRAConfig(targets=("q", "mlp/up")), rngs=nnx.Rngs(1))

    _, abstract = param_trees.describe(make, None)
    added = param_trees.leaves_by_path(param_trees.split(abstract, lora.is_added)[0])
    blocks = "decoder/stack/blocks"
    assert {path.rpartition("/")[0] for path in added} == {
        f"{blocks}/attention/q",
        f"{blocks}/mlp/up",
    }


def test_a_target_that_is_no_linear_map_is_refused():
    with pytest.raises(UserError, match="'query'; .* are down, gate, k, out, q, up, v"):
        param_trees.describe(
            lambda: make_lora_model(LLAMA, lora.LoRAConfig(targets=("query",))), None
        )


@pytest.mark.parametrize("wrong", [dict(rank=0), dict(alpha=0.0), dict(targets=())])
def test_sizes_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        lora.LoRAConfig(**wrong)
