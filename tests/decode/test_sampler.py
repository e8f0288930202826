"""Sampling with a cache equals sampling without one, in any batch and on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from rag_mm.core import sharding
from rag_mm.decode import cache, contrastive_decoding, decode_batch, sampler
from rag_mm.nn import decoder, param_trees
from rag_mm.nn.block import Heads

V, STEPS, LONGEST = 24, 6, 7
CONFIG = decoder.DecoderConfig(
    vocab_size=V,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=32,
    max_seq_len=40,
    qk_norm=True,
    smear_lags=((1, 2), (8, 9)),
    scale_embeddings=True,
)
GREEDY = sampler.Sampling(temperature=0.0)
WARM = sampler.Sampling(temperature=0.7, top_p=0.9)
ALL = np.ones(V, bool)
# Prompts of several lengths; the second starts at a later position and continues after a gap.
LENGTHS, STARTS, GAPS = (3, 7, 5, 6), (0, 10, 4, 0), (0, 3, 0, 1)


def make_model():
    return decoder.Decoder(CONFIG, rngs=nnx.Rngs(params=0))


def describe(mesh=None):
    return param_trees.describe(make_model, mesh)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def random(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, 0.4, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(random, describe()[1])


def make_prompts(which=range(4), length=LONGEST):
    rng = np.random.default_rng(1)
    texts = [rng.integers(V, size=n) for n in LENGTHS]
    tokens, positions, segment_ids = np.zeros((3, len(which), length), np.int32)
    for i, prompt in enumerate(which):
        n = LENGTHS[prompt]
        tokens[i, length - n :] = texts[prompt]
        positions[i, length - n :] = STARTS[prompt] + np.arange(n)
        segment_ids[i, length - n :] = 1
    next_positions = [STARTS[prompt] + LENGTHS[prompt] + GAPS[prompt] for prompt in which]
    return sampler.Prompts(tokens, positions, segment_ids, np.array(next_positions, np.int32))


def sample(params, prompts, seeds, allowed=ALL, sampling=GREEDY, **options):
    options = {"num_steps": STEPS} | options
    seeds = np.asarray(seeds, np.uint32)
    sampled = sampler.sample(
        params, prompts, seeds, allowed, graphdef=describe()[0], sampling=sampling, **options
    )
    return jax.tree.map(np.asarray, sampled)


@pytest.fixture(scope="module")
def next_logits(params):
    """(tokens, positions) of one sequence -> logits of the next token, by a full forward pass."""
    graphdef, _ = describe()

    @jax.jit
    def forward(tokens, positions, segment_ids):
        model = nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))
        return model.logits(model(tokens, positions, segment_ids))

    def call(tokens, positions):
        inputs = np.zeros((3, 1, LONGEST + STEPS), np.int32)
        inputs[0, 0, : len(tokens)], inputs[1, 0, : len(tokens)] = tokens, positions
        inputs[2, 0, : len(tokens)] = 1
        return np.asarray(forward(*inputs)[0, len(tokens) - 1])

    return call


def log_softmax(x):
    with np.errstate(divide="ignore"):
        return x - x.max() - np.log(np.exp(x - x.max()).sum())


def decode_without_cache(next_logits, prompts, row, allowed):
    """Greedy continuation of one prompt without padding, by full forward passes."""
    real = prompts.segment_ids[row] == 1
    tokens, positions = prompts.tokens[row][real].tolist(), prompts.positions[row][real].tolist()
    sampled, log_probs = [], []
    for i in range(STEPS):
        logits = np.where(allowed, next_logits(tokens, positions), -np.inf)
        sampled.append(int(logits.argmax()))
        log_probs.append(log_softmax(logits)[sampled[-1]])
        tokens.append(sampled[-1])
        positions.append(int(prompts.next_positions[row]) + i)
    return sampled, log_probs


@pytest.mark.parametrize("allowed", [ALL, np.arange(V) % 3 == 1], ids=["all", "some"])
def test_cached_equals_uncached_for_prompts_of_any_length(params, next_logits, allowed):
    prompts = make_prompts()
    sampled = sample(params, prompts, range(4), allowed)
    assert sampled.tokens.shape == (4, STEPS) and sampled.tokens.dtype == np.int32
    for row in range(4):
        tokens, log_probs = decode_without_cache(next_logits, prompts, row, allowed)
        assert sampled.tokens[row].tolist() == tokens
        np.testing.assert_allclose(sampled.log_probs[row], log_probs, atol=2e-5)


def test_a_prompt_alone_without_padding_gives_the_same_tokens(params):
    together = sample(params, make_prompts(), range(4), sampling=WARM)
    alone = sample(params, make_prompts([2], LENGTHS[2]), [2], sampling=WARM)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[2])
    np.testing.assert_allclose(alone.log_probs[0], together.log_probs[2], atol=2e-5)


def test_a_seed_gives_the_same_tokens_in_another_batch(params):
    first = sample(params, make_prompts(), [5, 6, 7, 8], sampling=WARM)
    order = [2, 0, 3, 1]
    mixed = sample(params, make_prompts(order), [7, 5, 8, 6], sampling=WARM)
    np.testing.assert_array_equal(mixed.tokens, first.tokens[order])
    np.testing.assert_allclose(mixed.log_probs, first.log_probs[order], atol=1e-5)
    other = sample(params, make_prompts(), [5, 16, 7, 8], sampling=WARM)
    np.testing.assert_array_equal(other.tokens[[0, 2, 3]], first.tokens[[0, 2, 3]])
    assert (other.tokens[1] != first.tokens[1]).any()


def test_log_probs_are_those_of_the_model_before_temperature(params, next_logits):
    """They are a log-softmax over the allowed tokens, for the tokens that were sampled."""
    prompts, allowed = make_prompts(), np.arange(V) < 20
    sampled = sample(params, prompts, range(4), allowed, WARM)
    row = 1
    tokens, positions = prompts.tokens[row].tolist(), prompts.positions[row].tolist()
    for i, (token, log_prob) in enumerate(
        zip(sampled.tokens[row], sampled.log_probs[row], strict=True)
    ):
        logits = np.where(allowed, next_logits(tokens, positions), -np.inf)
        assert log_prob == pytest.approx(log_softmax(logits)[token], abs=2e-5)
        tokens.append(int(token))
        positions.append(int(prompts.next_positions[row]) + i)


def sample_many(params, sampling, allowed, **options):
    """The first token of 1,024 copies of a prompt with different seeds."""
    prompts = make_prompts([1] * 1024)
    return sample(params, prompts, range(1024), allowed, sampling, num_steps=1, **options)


@pytest.mark.parametrize(("temperature", "top_p"), [(2.0, 1.0), (0.7, 0.6), (1.0, 1e-6)])
def test_frequencies_are_the_softmax_of_the_nucleus(params, next_logits, temperature, top_p):
    prompts, allowed = make_prompts([1]), np.arange(V) != 5
    logits = next_logits(prompts.tokens[0], prompts.positions[0]) / temperature
    probs = np.exp(log_softmax(np.where(allowed, logits, -np.inf)))
    order = np.argsort(-probs)
    size = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1 if top_p < 1 else V
    nucleus = np.zeros(V)
    nucleus[order[:size]] = probs[order[:size]]
    nucleus /= nucleus.sum()
    sampled = sample_many(params, sampler.Sampling(temperature, top_p), allowed).tokens[:, 0]
    counts = np.bincount(sampled, minlength=V)
    assert (counts[nucleus == 0] == 0).all()
    np.testing.assert_allclose(counts / 1024, nucleus, atol=0.06)


def test_after_the_stop_token_a_sequence_repeats_it_with_log_prob_zero(params):
    prompts = make_prompts()
    free = sample(params, prompts, range(4))
    stop = int(free.tokens[0, 2])
    sampled = sample(params, prompts, range(4), stop=stop)
    for row in range(4):
        stops = np.flatnonzero(free.tokens[row] == stop)
        end = stops[0] + 1 if stops.size else STEPS
        np.testing.assert_array_equal(sampled.tokens[row, :end], free.tokens[row, :end])
        np.testing.assert_array_equal(sampled.log_probs[row, :end], free.log_probs[row, :end])
        assert (sampled.tokens[row, end:] == stop).all() and (
            sampled.log_probs[row, end:] == 0
        ).all()


def on_mesh(params, *mesh_shape):
    _, abstract = describe(sharding.make_mesh(*mesh_shape))
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract)


@pytest.mark.parametrize(
    "mesh_shape",
    [
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
        pytest.param((4, 2, 1), marks=pytest.mark.slow),
        (2, 2, 2),
    ],
    ids=["8", "4x2x1", "2x2x2"],
)
def test_eight_devices_sample_the_same_tokens_as_one(params, mesh_shape):
    """Also a batch of 3, which does not split over them; layers unrolled."""
    one = sample(params, make_prompts(), range(4), sampling=WARM)
    placed = on_mesh(params, *mesh_shape)
    eight = sample(placed, make_prompts([0, 1, 2]), range(3), sampling=WARM)
    np.testing.assert_array_equal(eight.tokens, one.tokens[:3])
    np.testing.assert_allclose(eight.log_probs, one.log_probs[:3], atol=2e-5)


def test_eight_devices_scan_layers_and_streams_to_the_same_tokens(params):
    """The cache is split over heads and examples; a contrast sorts each example's logits."""
    combine = contrastive_decoding.Contrast(k=3, alpha=0.5).combine()
    options = dict(is_scanned=True, sampling=WARM, combine=combine)
    streams = [make_prompts(), make_prompts([3, 2, 1, 0])]
    one = sample(params, streams, range(4), **options)
    placed = on_mesh(params, 2, 2, 2)
    eight = sample(placed, streams, range(4), **options)
    np.testing.assert_array_equal(eight.tokens, one.tokens)
    for found, expected in zip(eight, one, strict=True):
        np.testing.assert_allclose(found, expected, atol=5e-5)
    mesh = decode_batch.mesh_of(placed)
    with jax.set_mesh(mesh):
        heads = jax.device_put(
            jnp.zeros((2, 8, 4, 2, 4)),
            jax.NamedSharding(mesh, P(None, ("data", "fsdp"), None, "tensor", None)),
        )
        held = cache.make_cache(Heads(None, heads, heads), 2, is_scanned=True)
    assert held.keys.sharding.shard_shape(held.keys.shape) == (2, 2, 1, 4, 6)


def test_scanned_layers_sample_the_tokens_of_unrolled_ones(params):
    unrolled, scanned = (
        sample(params, make_prompts(), range(4), sampling=WARM, is_scanned=is_scanned)
        for is_scanned in (False, True)
    )
    np.testing.assert_array_equal(scanned.tokens, unrolled.tokens)
    np.testing.assert_allclose(scanned.log_probs, unrolled.log_probs, atol=2e-5)


def test_deep_narrow_models_scan_their_layers_and_shallow_or_wide_ones_do_not():
    def is_scanned(num_layers, layer_bytes=10**6, batch_size=1, num_steps=64):
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        return cache.scans_layers(config, layer_bytes, batch_size, 128, num_steps)

    assert is_scanned(30) and not is_scanned(cache.MAX_UNROLLED)
    assert not is_scanned(30, layer_bytes=176 * 10**6)  # LLaMA 1.1B
    assert not is_scanned(30, num_steps=10_000)
    assert not is_scanned(30, batch_size=10_000)


def guide(weight, logits, allowed=None):
    return logits[1] + weight * (logits[0] - logits[1])


def guide_by(weight):
    return jax.tree_util.Partial(guide, jnp.float32(weight))


def test_streams_share_the_token_of_the_combined_logits(params, next_logits):
    """Against full forward passes; every stream has its own prompt, padding and positions."""
    streams, allowed, weight = (make_prompts(), make_prompts([1, 2, 3, 0])), np.arange(V) != 3, 2.5
    sampled = sample(params, streams, range(4), allowed, combine=guide_by(weight))
    assert sampled.stream_log_probs.shape == (4, 2, STEPS)
    for row in range(4):
        histories = []
        for prompts in streams:
            real = prompts.segment_ids[row] == 1
            histories.append([x[row][real].tolist() for x in (prompts.tokens, prompts.positions)])
        for i, token in enumerate(sampled.tokens[row].tolist()):
            logits = np.stack([next_logits(*history) for history in histories])
            combined = np.where(allowed, guide(weight, logits), -np.inf)
            assert token == combined.argmax()
            assert sampled.log_probs[row, i] == pytest.approx(
                log_softmax(combined)[token], abs=1e-4
            )
            for s, (prompts, history) in enumerate(zip(streams, histories, strict=True)):
                expected = log_softmax(logits[s])[token]
                assert sampled.stream_log_probs[row, s, i] == pytest.approx(expected, abs=2e-5)
                history[0].append(token)
                history[1].append(int(prompts.next_positions[row]) + i)


def test_streams_may_have_prompts_of_different_padded_lengths(params):
    short = make_prompts([0, 2], 5)
    sampled = sample(
        params, [short, make_prompts([1, 3])], [7, 8], combine=guide_by(1.0), sampling=WARM
    )
    alone = sample(params, short, [7, 8], sampling=WARM)
    np.testing.assert_array_equal(sampled.tokens, alone.tokens)


def by_parity(step):
    return (jnp.arange(V, dtype=jnp.int32) + step) % 2 == 0


def by_parity_and_row(step):
    return jnp.stack([by_parity(step), by_parity(step + 1)])


def test_every_step_has_its_own_allowed_tokens(params):
    prompts, sampling = make_prompts([0, 1]), sampler.Sampling(temperature=3.0)
    masks = np.stack([by_parity(i) for i in range(STEPS)])
    listed = sample(params, prompts, [0, 1], masks, sampling)
    computed = sample(params, prompts, [0, 1], by_parity, sampling)
    np.testing.assert_array_equal(computed.tokens, listed.tokens)
    assert (listed.tokens % 2 == np.arange(STEPS) % 2).all()
    by_row = sample(params, prompts, [0, 1], by_parity_and_row, sampling)
    np.testing.assert_array_equal(by_row.tokens[0], listed.tokens[0])
    assert (by_row.tokens[1] % 2 == (np.arange(STEPS) + 1) % 2).all()


@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf, jnp.inf])
def test_no_combined_logits_lead_to_a_token_that_is_not_allowed(params, value):
    """Tokens without a finite logit are left out; if none is left, the allowed ones are equally likely."""
    spoil = jax.tree_util.Partial(spoil_above, jnp.float32(value))
    allowed = np.arange(V) >= 18
    sampled = sample_many(params, sampler.Sampling(1.0), allowed, combine=spoil)
    assert set(sampled.tokens[:, 0]) == set(range(18, V))
    np.testing.assert_allclose(sampled.log_probs, np.log(1 / 6), atol=1e-6)
    some = sample_many(params, sampler.Sampling(1.0), np.arange(V) >= 9, combine=spoil).tokens
    assert set(some[:, 0]) <= {9, 10, 11}


def spoil_above(value, logits, allowed):
    return jnp.where(jnp.arange(V, dtype=jnp.int32)[None] < 12, logits[0], value)


def test_the_record_names_the_distribution_the_token_was_sampled_from(params, next_logits):
    prompts, allowed = make_prompts([1]), np.arange(V) != 5
    logits = next_logits(prompts.tokens[0], prompts.positions[0])
    found = sample_many(params, sampler.Sampling(0.7, 0.6), allowed)
    kept = np.unique(found.tokens)
    assert len(kept) < V - 1
    scaled = np.full(V, -np.inf)
    scaled[kept] = logits[kept] / 0.7
    tokens = found.tokens[:, 0]
    np.testing.assert_allclose(
        found.sampled_log_probs[:, 0], log_softmax(scaled)[tokens], atol=1e-4
    )
    assert found.stream_log_probs is None
    greedy = sample(params, prompts, [0], allowed)
    assert (greedy.sampled_log_probs == 0).all() and (greedy.log_probs < 0).all()


def test_a_limit_takes_the_first_steps_of_a_longer_program(params):
    whole = sample(params, make_prompts(), range(4), sampling=WARM)
    compiled = sampler._sample._cache_size()
    for limit in (2, 4):
        part = sample(params, make_prompts(), range(4), sampling=WARM, limit=limit)
        np.testing.assert_array_equal(part.tokens[:, :limit], whole.tokens[:, :limit])
        assert (part.tokens[:, limit:] == 0).all() and (part.log_probs[:, limit:] == 0).all()
    assert sampler._sample._cache_size() <= compiled + 1


def test_values_that_change_no_shape_compile_nothing(params):
    """Two guidance weights, temperatures, top-p, masks and seeds: one program."""
    streams = [make_prompts(), make_prompts()]
    call = functools.partial(sample, params, streams)
    call(range(4), combine=guide_by(1.5), sampling=WARM)
    compiled = sampler._sample._cache_size()
    other = sampler.Sampling(temperature=0.5, top_p=0.8)
    call(range(4, 8), np.arange(V) < 9, combine=guide_by(4.0), sampling=other)
    assert sampler._sample._cache_size() == compiled


def test_arguments_that_cannot_be_are_refused(params):
    with pytest.raises(ValueError, match="combine"):
        sample(params, [make_prompts(), make_prompts()], range(4))
    with pytest.raises(ValueError, match="at least one allowed"):
        sample(params, make_prompts(), range(4), np.zeros(V, bool))
    with pytest.raises(ValueError, match=f"2 masks for {STEPS} steps"):
        sample(params, make_prompts(), range(4), np.ones((2, V), bool))


def test_sampling_in_bfloat16(params):
    """The cache has the activations' dtype; log-probabilities stay float32."""
    config = decoder.DecoderConfig(**CONFIG.__dict__ | {"dtype": "bfloat16"})
    make = lambda: decoder.Decoder(config, rngs=nnx.Rngs(params=0))
    graphdef, _ = param_trees.describe(make, None)
    call = functools.partial(sampler.sample, graphdef=graphdef, num_steps=2, sampling=GREEDY)
    seeds = np.zeros(4, np.uint32)
    sampled = jax.eval_shape(call, params, make_prompts(), seeds, ALL)
    assert sampled.tokens.dtype == np.int32 and sampled.log_probs.dtype == np.float32


@pytest.mark.parametrize("values", [(-0.1, 1.0), (1.0, 0.0), (1.0, 1.1), (float("nan"), 1.0)])
def test_invalid_sampling_is_rejected(values):
    with pytest.raises(ValueError, match="temperature"):
        sampler.Sampling(*values)
