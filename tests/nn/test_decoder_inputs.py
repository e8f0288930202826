"""A decoder over vectors, or tokens mixed with vectors, and blocks that read a context."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import naive_decoder
import numpy as np
import pytest
from flax import nnx

from rag_mm.core import sharding
from rag_mm.nn import decoder, param_trees
from rag_mm.nn.block import Context
from rag_mm.ops import rope

SIZES = dict(vocab_size=24, num_layers=2, embed_dim=16, num_heads=4, mlp_dim=24, max_seq_len=40)
SCALED = decoder.DecoderConfig(
    **SIZES,
    norm="layernorm",
    positions="sinusoidal",
    mlp="relu",
    use_bias=True,
    tie_embeddings=True,
    scale_embeddings=True,
)
SMEARED = decoder.DecoderConfig(
    **SIZES, num_kv_heads=2, qk_norm=True, smear_lags=((1,), (3, 1)), context_dim=10
)
READING = {
    "smeared": SMEARED,
    "scaled": dataclasses.replace(SCALED, context_dim=10),
    "learned": decoder.DecoderConfig(**SIZES, positions="learned", mlp="gelu", context_dim=16),
}
B, T, M = 4, 8, 5
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(24, size=(B, T)).astype(np.int32)
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))
SEGMENTS = np.repeat([[1, 1, 1, 2, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1, 1, 1]], 2, 0).astype(np.int32)
VECTORS = RNG.normal(size=(B, T, 16)).astype(np.float32)
# All, some, none and one of the context's vectors count.
COUNTED = np.array([[1] * 5, [1, 0, 1, 1, 0], [0] * 5, [0, 0, 0, 0, 1]], bool)


def make_context(config, seed=1):
    rng = np.random.default_rng(seed)
    return Context(rng.normal(size=(B, M, config.context_dim)).astype(np.float32), COUNTED)


@functools.cache
def make(config):
    """Random parameters, and the compiled function (inputs, context) -> (input vectors, logits)."""
    graphdef, params = naive_decoder.random_params(config)

    @jax.jit
    def run(params, inputs, context):
        model = nnx.merge(graphdef, params)
        hidden = model(inputs, POSITIONS, SEGMENTS, context)
        return model.input_vectors(inputs), model.logits(hidden)

    return params, functools.partial(run, params)


@pytest.mark.parametrize("config", [SCALED, SMEARED], ids=["scaled", "smeared"])
def test_the_vectors_of_tokens_are_the_same_input_as_the_tokens(config):
    _, run = make(config)
    context = make_context(config) if config.context_dim else None
    vectors, expected = run(TOKENS, context)
    again, logits = run(vectors, context)
    np.testing.assert_array_equal(again, vectors)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    mixture = decoder.Mixture(np.zeros_like(TOKENS), vectors, np.ones(TOKENS.shape, bool))
    np.testing.assert_allclose(run(mixture, context)[1], expected, atol=1e-5)


def test_vectors_stand_where_the_mask_says_unscaled_and_with_positions():
    params, run = make(SCALED)
    is_vector = np.zeros(TOKENS.shape, bool)
    is_vector[:, 2:4] = True
    found, logits = run(decoder.Mixture(TOKENS, VECTORS, is_vector), None)
    expected = np.where(is_vector[..., None], VECTORS, 4 * params["embedding"]["table"][TOKENS])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(run(expected, None)[1], logits, atol=1e-5)
    hidden_tokens = np.where(is_vector, 23, TOKENS)
    np.testing.assert_array_equal(
        run(decoder.Mixture(hidden_tokens, VECTORS, is_vector), None)[1], logits
    )
    model = nnx.merge(naive_decoder.random_params(SCALED)[0], params)
    embedded = jax.jit(lambda model, x: model.embed(x, POSITIONS))(model, VECTORS)
    np.testing.assert_allclose(embedded - VECTORS, rope.sinusoids(POSITIONS, 16), atol=1e-5)


def test_the_gradient_reaches_the_vectors_that_stand_and_earlier_targets_see_none_of_it():
    graphdef, params = naive_decoder.random_params(SCALED)
    is_vector = np.arange(T)[None] % 3 == np.zeros((B, 1), int)

    @jax.jit
    def grad(params, vectors):
        def first_half(vectors):
            inputs = decoder.Mixture(jnp.asarray(TOKENS), vectors, jnp.asarray(is_vector))
            hidden = nnx.merge(graphdef, params)(inputs, POSITIONS, None)
            return jnp.square(hidden[:, :5, :8]).sum()

        return jax.grad(first_half)(vectors)

    reached = np.asarray(grad(params, VECTORS) != 0).any(-1)
    np.testing.assert_array_equal(reached, is_vector & (np.arange(T) < 5)[None])


def test_a_decoder_without_a_vocabulary_takes_and_gives_vectors():
    config = dataclasses.replace(SMEARED, vocab_size=0)
    graphdef, params = naive_decoder.random_params(config)
    assert set(params) == {"stack", "norm"}
    model = nnx.merge(graphdef, params)
    call = jax.jit(lambda model, x, context: model(x, POSITIONS, None, context))
    assert call(model, VECTORS, make_context(config)).shape == (B, T, 16)
    with pytest.raises(ValueError, match="takes vectors"):
        model.embed(TOKENS, POSITIONS)
    with pytest.raises(ValueError, match="has no logits"):
        model.logits(jnp.asarray(VECTORS))


@pytest.mark.parametrize("family", READING)
def test_cross_attention_equals_the_naive_one(family):
    config = READING[family]
    params, run = make(config)
    context = make_context(config)
    contexts = [x[counted] for x, counted in zip(context.vectors, COUNTED, strict=True)]
    expected = naive_decoder.forward(config, params, TOKENS, POSITIONS, SEGMENTS, contexts)
    atol = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(run(TOKENS, context)[1], expected, rtol=1e-5, atol=atol)


def test_what_does_not_count_changes_nothing():
    config = READING["smeared"]
    _, run = make(config)
    context = make_context(config)
    other = np.where(COUNTED[..., None], context.vectors, 9.0).astype(np.float32)
    logits = run(TOKENS, context)[1]
    np.testing.assert_allclose(run(TOKENS, context._replace(vectors=other))[1], logits, atol=1e-6)
    changed = context._replace(vectors=context.vectors + 1)
    is_same = np.abs(run(TOKENS, changed)[1] - logits).max((1, 2)) < 1e-6
    assert is_same.tolist() == [False, False, True, False]


def test_the_other_parameters_start_as_without_cross_attention():
    plain = dataclasses.replace(SMEARED, context_dim=None)
    init = lambda config: jax.jit(
        lambda: nnx.to_pure_dict(nnx.split(naive_decoder.make_model(config), nnx.Param)[1])
    )()
    with_it, without = (
        param_trees.leaves_by_path(jax.device_get(init(config))) for config in (SMEARED, plain)
    )
    added = set(with_it) - set(without)
    assert all("/cross_" in path for path in added) and len(added) == 7
    for path, leaf in without.items():
        np.testing.assert_array_equal(with_it[path], leaf)
    assert with_it["stack/blocks/cross_attention/k/kernel"].shape == (2, 10, 2, 4)


def test_a_context_is_given_exactly_where_it_is_read():
    for config, context in ((SMEARED, None), (SCALED, make_context(SMEARED))):
        _, run = make(config)
        with pytest.raises(ValueError, match="give a context exactly where"):
            run(TOKENS, context)
    with pytest.raises(ValueError, match="context_dim is 0"):
        dataclasses.replace(SMEARED, context_dim=0)
    with pytest.raises(ValueError, match="vocab_size is -1"):
        dataclasses.replace(SMEARED, vocab_size=-1)


def grads(config, mesh=None):
    """The gradient of a loss of a mixture with a context, by parameters, vectors and context."""
    make_model = functools.partial(naive_decoder.make_model, config)
    graphdef, abstract = param_trees.describe(make_model, mesh)
    _, params = naive_decoder.random_params(SMEARED)
    weights = np.random.default_rng(3).normal(size=(B, T, 24)).astype(np.float32)
    batch = dict(
        tokens=TOKENS,
        vectors=VECTORS,
        is_vector=TOKENS % 2 == 0,
        positions=POSITIONS,
        segments=SEGMENTS,
        context=make_context(config).vectors,
        counted=COUNTED,
        weights=weights,
    )

    def loss(params, vectors, context, batch):
        inputs = decoder.Mixture(batch["tokens"], vectors, batch["is_vector"])
        model = nnx.merge(graphdef, params)
        read = Context(context, batch["counted"])
        logits = model.logits(model(inputs, batch["positions"], batch["segments"], read))
        return (logits * batch["weights"]).sum()

    compute = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    if mesh is None:
        return compute(params, batch["vectors"], batch["context"], batch)
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract)
    with jax.set_mesh(mesh):
        placed = sharding.put_batch(batch, mesh)
        return compute(params, placed["vectors"], placed["context"], placed)


@pytest.fixture(scope="module")
def alone():
    return grads(SMEARED)


def assert_near(found, expected, share):
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        left, right = (np.asarray(x, np.float64) for x in (left, right))
        assert np.abs(left - right).max() <= share * np.abs(right).max()


def test_on_a_mesh_and_recomputed_the_gradients_are_the_same(alone):
    mesh = sharding.make_mesh(2, 2, 2)
    found = grads(dataclasses.replace(SMEARED, remat="full"), mesh)
    assert_near(found, alone, 1e-5)
    kernel = found[0]["stack"]["blocks"]["cross_attention"]["k"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor", None)


@pytest.mark.slow
def test_bfloat16_gradients_are_near(alone):
    with jax.numpy_dtype_promotion("standard"):  # of jax's own attention
        found = grads(dataclasses.replace(SMEARED, dtype="bfloat16", remat="dots"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    total = lambda tree: np.sqrt(sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(tree)))
    difference = jax.tree.map(lambda a, b: jnp.asarray(a) - jnp.asarray(b), found, alone)
    assert 1e-4 * total(alone) < total(difference) < 0.05 * total(alone)
