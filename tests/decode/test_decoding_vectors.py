"""Prompts with vectors and a context, and loops that feed hidden states back, against full forward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.core import sharding
from rag_mm.decode import cache, sampler
from rag_mm.nn import decoder, param_trees
from rag_mm.nn.block import Context

CONFIG = decoder.DecoderConfig(
    vocab_size=24,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=32,
    max_seq_len=40,
    qk_norm=True,
    smear_lags=((1, 2), ()),
    scale_embeddings=True,
    context_dim=11,
)
B, LENGTH, M, STEPS = 2, 6, 5, 4
# The second prompt is shorter, and of its context less counts.
PADDING = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]], np.int32)
COUNTED = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]], bool)


def make_model():
    return decoder.Decoder(CONFIG, rngs=nnx.Rngs(params=0))


@functools.cache
def describe():
    return param_trees.describe(make_model, None)


@functools.cache
def random_params():
    rng = np.random.default_rng(0)

    def random(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, 0.4, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(random, describe()[1])


def make_prompts(seed=1):
    rng = np.random.default_rng(seed)
    mixture = decoder.Mixture(
        rng.integers(24, size=(B, LENGTH)).astype(np.int32),
        rng.normal(size=(B, LENGTH, 16)).astype(np.float32),
        np.arange(LENGTH)[None] % 2 == np.ones((B, 1), int),
    )
    context = Context(rng.normal(size=(B, M, 11)).astype(np.float32), COUNTED)
    positions = np.maximum(PADDING.cumsum(1) - 1, 0).astype(np.int32)
    return sampler.Prompts(mixture, positions, PADDING, positions[:, -1] + 1, context)


def forward(params, vectors, prompts):
    """Hidden states and logits of the prompts followed by further vectors, without a cache."""
    num_more = vectors.shape[1] - LENGTH
    later = prompts.next_positions[:, None] + np.arange(num_more, dtype=np.int32)[None]
    positions = np.concatenate([prompts.positions, later], 1)
    segments = np.pad(prompts.segment_ids, ((0, 0), (0, num_more)), constant_values=1)
    return call(params, vectors, positions, segments, prompts.context)


@jax.jit
def call(params, *inputs):
    model = nnx.merge(describe()[0], params)
    hidden = model(*inputs)
    return hidden, model.logits(hidden)


input_vectors = jax.jit(lambda params, x: nnx.merge(describe()[0], params).input_vectors(x))


def decode_without_cache(prompts):
    """Greedy tokens by full forward passes over what has been sampled so far."""
    params, tokens = random_params(), np.zeros((B, 0), np.int32)
    vectors = np.asarray(input_vectors(params, prompts.tokens))
    for _ in range(STEPS):
        more = np.asarray(input_vectors(params, np.pad(tokens, ((0, 0), (0, STEPS)))))
        whole = np.concatenate([vectors, more[:, :STEPS]], 1)
        logits = forward(params, whole, prompts)[1]
        at = LENGTH - 1 + tokens.shape[1]
        tokens = np.concatenate([tokens, np.asarray(logits)[:, at].argmax(-1)[:, None]], 1)
        tokens = tokens.astype(np.int32)
    return tokens


def sample(params, prompts, **options):
    return sampler.sample(
        params,
        prompts,
        np.zeros(B, np.uint32),
        np.ones(24, bool),
        graphdef=describe()[0],
        num_steps=STEPS,
        sampling=sampler.Sampling(temperature=0.0),
        **options,
    )


@pytest.mark.parametrize("is_scanned", [False, True], ids=["unrolled", "scanned"])
def test_prompts_with_vectors_and_a_context_go_on_as_without_a_cache(is_scanned):
    prompts = make_prompts()
    sampled = sample(random_params(), prompts, is_scanned=is_scanned)
    np.testing.assert_array_equal(sampled.tokens, decode_without_cache(prompts))


def test_on_a_mesh_the_tokens_are_those_of_one_device():
    prompts, mesh = make_prompts(), sharding.make_mesh(2, 1, 2)
    _, abstract = param_trees.describe(make_model, mesh)
    params = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding), random_params(), abstract
    )
    sampled = sample(params, prompts)
    np.testing.assert_array_equal(sampled.tokens, decode_without_cache(prompts))


def test_streams_have_contexts_of_their_own():
    """The second stream's context is another; `combine` reads it alone."""
    first, second = make_prompts(1), make_prompts(2)
    shorter = sampler.Prompts(
        *jax.tree.map(lambda x: x[:, 1:], second[:3]), second.next_positions, second.context
    )
    second_only = jax.tree_util.Partial(lambda logits, allowed: logits[1])
    sampled = sample(random_params(), (first, shorter), combine=second_only)
    alone = sample(random_params(), shorter)
    np.testing.assert_array_equal(sampled.tokens, alone.tokens)


def bodies_of_loops(jaxpr):
    """What every `while` in a program repeats."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation.params["body_jaxpr"].jaxpr
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from bodies_of_loops(value.jaxpr)


@pytest.mark.parametrize("is_scanned", [False, True], ids=["unrolled", "scanned"])
def test_no_step_computes_with_the_context_itself(is_scanned):
    """Its keys and values enter the loop, its vectors do not."""
    params, prompts = describe()[1], make_prompts()
    program = functools.partial(sample, is_scanned=is_scanned)
    whole = jax.make_jaxpr(program)(params, prompts).jaxpr
    loops = [str(body) for body in bodies_of_loops(whole)]
    assert "f32[2,5,11]" in str(whole) and any("f32[2,2,4,5]" in body for body in loops)
    assert not any("f32[2,5,11]" in body for body in loops)


def test_vectors_fed_back_from_a_cache_are_those_of_full_forward_passes():
    """The next input is a linear map of the hidden state, as where a decoder draws an image."""
    params, prompts = random_params(), make_prompts()
    change = np.random.default_rng(5).normal(size=(16, 16)).astype(np.float32) / 4

    @jax.jit
    def roll_out(params, prompts):
        model = nnx.merge(describe()[0], params)
        hidden, heads = model.prefill(*prompts[:3], prompts.context)
        segments = jnp.pad(prompts.segment_ids, ((0, 0), (0, STEPS)), constant_values=1)
        blocks = model.stack.unstack()

        def step(carry, i):
            layers, vectors = carry
            positions = prompts.next_positions[:, None] + i
            rotation = CONFIG.block.rotation(positions)
            attend = cache.make_attend(LENGTH + i, segments)
            hidden, layers = model.decode_step(blocks, vectors, positions, rotation, attend, layers)
            return (layers, hidden @ change), vectors[:, 0]

        start = cache.make_cache(heads, STEPS), hidden[:, -1:] @ change
        return jnp.moveaxis(jax.lax.scan(step, start, jnp.arange(STEPS, dtype=jnp.int32))[1], 0, 1)

    vectors = np.asarray(input_vectors(params, prompts.tokens))
    drawn = np.zeros((B, STEPS, 16), np.float32)
    for i in range(STEPS):
        hidden, _ = forward(params, np.concatenate([vectors, drawn], 1), prompts)
        drawn[:, i] = np.asarray(hidden)[:, LENGTH - 1 + i] @ change
    np.testing.assert_allclose(roll_out(params, prompts), drawn, atol=1e-4)
