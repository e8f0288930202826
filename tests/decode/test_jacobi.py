"""Speculative Jacobi decoding: the distribution of sequential sampling, in fewer passes than steps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from rag_mm.core import sharding
from rag_mm.decode import jacobi, sampler
from rag_mm.nn import decoder, param_trees
from rag_mm.nn.block import Context

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
    context_dim=6,
)
# All 81 sequences of 4 tokens can be counted.
TOY = decoder.DecoderConfig(
    vocab_size=3, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8, max_seq_len=16
)
TOY_STEPS, DRAWS = 4, 50_000
GREEDY, WARM = sampler.Sampling(temperature=0.0), sampler.Sampling(temperature=0.9, top_p=0.95)
ALL = np.ones(V, bool)
LENGTHS = (3, 7, 5, 6)


@functools.cache
def describe(config, mesh=None):
    return param_trees.describe(lambda: decoder.Decoder(config, rngs=nnx.Rngs(params=0)), mesh)


@functools.cache
def make_params(config, std):
    rng = np.random.default_rng(0)

    def random(path, leaf):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        return rng.normal(mean, std, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(random, describe(config)[1])


def make_prompts(which=range(4), length=LONGEST):
    rng = np.random.default_rng(1)
    texts = [rng.integers(V, size=n) for n in LENGTHS]
    vectors = rng.normal(size=(4, 3, 6)).astype(np.float32)[list(which)]
    tokens, segment_ids = np.zeros((2, len(which), length), np.int32)
    for i, prompt in enumerate(which):
        tokens[i, length - LENGTHS[prompt] :] = texts[prompt]
        segment_ids[i, length - LENGTHS[prompt] :] = 1
    positions = np.maximum(segment_ids.cumsum(1) - 1, 0).astype(np.int32)
    following = positions[:, -1] + 1
    return sampler.Prompts(tokens, positions, segment_ids, following, Context(vectors))


def call(function, prompts, seeds, allowed=ALL, sampling=GREEDY, params=None, **options):
    params = make_params(CONFIG, 0.4) if params is None else params
    options = {"num_steps": STEPS, "graphdef": describe(CONFIG)[0]} | options
    seeds = np.asarray(seeds, np.uint32)
    result = function(params, prompts, seeds, allowed, sampling=sampling, **options)
    return jax.tree.map(np.asarray, result)


sample, in_sequence = (
    functools.partial(call, jacobi.sample),
    functools.partial(call, sampler.sample),
)


def guide(weight, logits, allowed):
    return weight * logits[0] + (1 - weight) * logits[1]


def guide_by(weight):
    return jax.tree_util.Partial(guide, jnp.float32(weight))


# The toy: every sequence's probability.


def toy_prompts(tokens, count):
    repeated = np.tile(np.asarray(tokens, np.int32), (count, 1))
    positions = np.tile(np.arange(len(tokens), dtype=np.int32), (count, 1))
    segment_ids = np.ones_like(positions)
    return sampler.Prompts(repeated, positions, segment_ids, segment_ids.sum(1, dtype=np.int32))


def log_softmax(x):
    with np.errstate(divide="ignore"):
        return (
            x
            - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - x.max(-1, keepdims=True)
        )


SEQUENCES = np.array(list(itertools.product(range(3), repeat=TOY_STEPS)), np.int32)


@functools.cache
def toy_logits(prompt):
    """Logits of every token of every sequence, [81, 4, 3], by one full forward pass."""
    tokens = np.concatenate([np.tile(np.array(prompt, np.int32), (81, 1)), SEQUENCES], 1)
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (81, 1))
    model = nnx.merge(describe(TOY)[0], jax.tree.map(jnp.asarray, make_params(TOY, 0.5)))
    logits = model.logits(model(tokens, positions, None))
    return np.asarray(logits)[:, len(prompt) - 1 : -1].astype(float)


def nucleus(logits, top_p):
    """Keeps the likeliest tokens until their probability reaches top_p; one row at a time."""
    kept = np.full_like(logits, -np.inf)
    for row in np.ndindex(logits.shape[:-1]):
        probs = np.exp(log_softmax(logits[row]))
        total = 0.0
        for token in np.argsort(-probs):
            kept[row][token] = logits[row][token]
            total += probs[token]
            if total >= top_p:
                break
    return kept


def toy_log_probs(combined, sampling):
    """Log-probabilities of each token of each sequence [81, 4]: of the model, and of the sampling."""
    sampled = nucleus(combined / sampling.temperature, sampling.top_p)
    of_token = lambda x: np.take_along_axis(log_softmax(x), SEQUENCES[..., None], -1)[..., 0]
    return of_token(combined), of_token(sampled)


def chi_square(tokens, log_probs):
    """The statistic of drawn sequences against their probabilities, and its 99.9 % bound."""
    index = (tokens * 3 ** np.arange(TOY_STEPS)[::-1]).sum(1)
    counts = np.bincount(index, minlength=81)
    expected = len(tokens) * np.exp(log_probs.sum(1))
    assert expected.sum() == pytest.approx(len(tokens))
    assert (counts[expected == 0] == 0).all()
    rare = expected < 5
    counts, expected = (
        np.append(x[~rare], x[rare].sum()) if x[rare].sum() else x[~rare]
        for x in (counts, expected)
    )
    found = ((counts - expected) ** 2 / expected).sum()
    return found, scipy.stats.chi2.ppf(0.999, len(expected) - 1)


def draw_toys(sampling, prompts=((0, 1),), **options):
    streams = [toy_prompts(prompt, DRAWS) for prompt in prompts]
    options = {"num_steps": TOY_STEPS, "graphdef": describe(TOY)[0]} | options
    options["params"] = make_params(TOY, 0.5)
    return sample(streams, range(DRAWS), np.ones(3, bool), sampling, **options)


HOT, NUCLEUS = sampler.Sampling(1.3), sampler.Sampling(1.3, 0.85)


@pytest.mark.parametrize(
    ("sampling", "prompts", "options"),
    [
        (HOT, [(0, 1)], {}),
        (HOT, [(0, 1)], {"drafts": np.tile(np.array([[1, 2, 0, 1]]), (DRAWS, 1))}),
        (NUCLEUS, [(0, 1)], {"is_coupled": False}),
        (NUCLEUS, [(0, 1), (2,)], {"combine": guide_by(1.5)}),
    ],
    ids=["coupled", "drafts", "uncoupled-nucleus", "guided-nucleus"],
)
def test_sequences_have_their_exact_probabilities(sampling, prompts, options):
    sampled, passes = draw_toys(sampling, prompts, **options)
    logits = np.stack([toy_logits(prompt) for prompt in prompts])
    combined = guide(1.5, logits, None) if len(prompts) > 1 else logits[0]
    of_model, of_sampling = toy_log_probs(combined, sampling)
    found, bound = chi_square(sampled.tokens, of_sampling)
    assert found < bound and len(np.unique(sampled.tokens, axis=0)) > 20
    assert passes.min() >= 1 and passes.max() <= TOY_STEPS - 1 and passes.mean() < TOY_STEPS - 1
    index = (sampled.tokens * 3 ** np.arange(TOY_STEPS)[::-1]).sum(1)
    np.testing.assert_allclose(sampled.log_probs, of_model[index], atol=1e-4)
    np.testing.assert_allclose(sampled.sampled_log_probs, of_sampling[index], atol=1e-4)
    assert (sampled.stream_log_probs is None) == (len(prompts) == 1)


@pytest.mark.parametrize(
    "rule",
    [lambda uniform, p, q: p > 0, lambda uniform, p, q: uniform < p],
    ids=["always", "without q"],
)
def test_a_wrong_rule_of_acceptance_is_noticed(rule, monkeypatch):
    program = jacobi._sample.__wrapped__
    static = ("graphdef", "num_steps", "is_coupled", "is_scanned")
    monkeypatch.setattr(jacobi, "_is_accepted", rule)
    fresh = jax.jit(lambda *args, **options: program(*args, **options), static_argnames=static)
    monkeypatch.setattr(jacobi, "_sample", fresh)
    sampled, _ = draw_toys(HOT)
    found, bound = chi_square(sampled.tokens, toy_log_probs(toy_logits((0, 1)), HOT)[1])
    assert found > 2 * bound


def test_coupled_drafts_need_no_more_passes():
    options = dict(num_steps=12, graphdef=describe(TOY)[0], params=make_params(TOY, 0.5))
    prompts, allowed = toy_prompts((0, 1), 256), np.ones(3, bool)
    run = functools.partial(sample, prompts, range(256), allowed, HOT, **options)
    coupled, uncoupled = (run(is_coupled=each)[1] for each in (True, False))
    assert max(coupled.max(), uncoupled.max()) <= 11
    assert coupled.mean() <= uncoupled.mean() + 0.5


# The larger model: smeared heads, a context, prompts of several lengths.


@pytest.mark.parametrize("is_scanned", [False, True], ids=["unrolled", "scanned"])
def test_greedy_tokens_are_those_of_sequential_decoding(is_scanned):
    expected = in_sequence(make_prompts(), range(4))
    sampled, passes = sample(make_prompts(), range(4), is_scanned=is_scanned)
    np.testing.assert_array_equal(sampled.tokens, expected.tokens)
    assert sampled.tokens.dtype == np.int32 and passes.dtype == np.int32 and passes.shape == (4,)
    np.testing.assert_allclose(sampled.log_probs, expected.log_probs, atol=2e-5)
    assert (sampled.sampled_log_probs == 0).all() and (passes <= STEPS - 1).all()


def test_drafts_that_are_right_take_one_pass_and_wrong_ones_are_replaced():
    expected = in_sequence(make_prompts(), range(4)).tokens
    sampled, passes = sample(make_prompts(), range(4), drafts=expected)
    np.testing.assert_array_equal(sampled.tokens, expected)
    assert (passes == 1).all()
    wrong = expected.copy()
    wrong[1, 3] = (wrong[1, 3] + 1) % V
    sampled, passes = sample(make_prompts(), range(4), drafts=wrong)
    np.testing.assert_array_equal(sampled.tokens, expected)
    assert passes[1] > 1 and (passes[[0, 2, 3]] == 1).all()


def test_a_seed_gives_the_same_tokens_in_another_batch_and_without_padding():
    first, passes = sample(make_prompts(), [50, 51, 52, 53], sampling=WARM)
    order = [2, 0, 3, 1]
    mixed, mixed_passes = sample(make_prompts(order), [52, 50, 53, 16], sampling=WARM)
    np.testing.assert_array_equal(mixed.tokens[:3], first.tokens[order[:3]])
    np.testing.assert_array_equal(mixed_passes[:3], passes[order[:3]])
    np.testing.assert_allclose(mixed.log_probs[:3], first.log_probs[order[:3]], atol=1e-5)
    assert (mixed.tokens[3] != first.tokens[1]).any() and len(set(passes)) > 1
    alone, alone_passes = sample(make_prompts([2], LENGTHS[2]), [52], sampling=WARM)
    np.testing.assert_array_equal(alone.tokens[0], first.tokens[2])
    assert alone_passes[0] == passes[2]


def by_parity(step):
    return (jnp.arange(V, dtype=jnp.int32) + step) % 2 == 0


def by_parity_and_row(step):
    return jnp.stack([by_parity(step), by_parity(step + 1)])


def test_every_position_has_its_own_allowed_tokens():
    prompts, hot = make_prompts([0, 1]), sampler.Sampling(temperature=3.0)
    masks = np.stack([by_parity(i) for i in range(STEPS)])
    listed, _ = sample(prompts, [0, 1], masks, hot)
    assert (listed.tokens % 2 == np.arange(STEPS) % 2).all()
    by_row, _ = sample(prompts, [0, 1], by_parity_and_row, hot)
    np.testing.assert_array_equal(by_row.tokens[0], listed.tokens[0])
    assert (by_row.tokens[1] % 2 == (np.arange(STEPS) + 1) % 2).all()


def test_streams_share_the_tokens_of_the_sequential_sampler():
    """Greedy ones; every stream has its own prompt, padding and context."""
    streams, some = [make_prompts(), make_prompts([3, 2, 1, 0])], np.arange(V) != 3
    expected = in_sequence(streams, range(4), some, combine=guide_by(2.5))
    sampled, _ = sample(streams, range(4), some, combine=guide_by(2.5))
    np.testing.assert_array_equal(sampled.tokens, expected.tokens)
    np.testing.assert_allclose(sampled.log_probs, expected.log_probs, atol=1e-4)
    np.testing.assert_allclose(sampled.stream_log_probs, expected.stream_log_probs, atol=1e-4)
    compiled = jacobi._sample._cache_size()
    sample(streams, range(4), some, combine=guide_by(1.0))
    assert jacobi._sample._cache_size() == compiled


@pytest.mark.parametrize(
    "allowed", [ALL, pytest.param(by_parity, marks=pytest.mark.slow)], ids=["mask", "function"]
)
def test_eight_devices_sample_the_tokens_of_one(allowed):
    """Three examples, which do not split over them."""
    mesh, which = sharding.make_mesh(2, 2, 2), [0, 1, 2]
    placed = jax.tree.map(
        lambda x, like: jax.device_put(x, like.sharding),
        make_params(CONFIG, 0.4),
        describe(CONFIG, mesh)[1],
    )
    is_mask = allowed is ALL
    options = dict(allowed=allowed, sampling=WARM, is_scanned=is_mask)
    streams = [make_prompts(which), make_prompts([2, 0, 1])][: 1 + is_mask]
    options |= {"combine": guide_by(1.5)} if is_mask else {}
    one, passes = sample(streams, which, **options)
    eight, eight_passes = sample(streams, which, params=placed, **options)
    np.testing.assert_array_equal(eight.tokens, one.tokens)
    np.testing.assert_array_equal(eight_passes, passes)
    np.testing.assert_allclose(eight.log_probs, one.log_probs, atol=5e-5)


def test_values_that_change_no_shape_compile_nothing():
    """Other temperatures, top-p, masks and seeds: one program."""
    sample(make_prompts(), range(4), sampling=WARM)
    compiled = jacobi._sample._cache_size()
    other = sampler.Sampling(temperature=0.5, top_p=0.8)
    sample(make_prompts(), range(4, 8), np.arange(V) < 9, other)
    assert jacobi._sample._cache_size() == compiled


def test_one_token_takes_no_pass():
    options = dict(num_steps=1, graphdef=describe(TOY)[0], params=make_params(TOY, 0.5))
    inputs = toy_prompts((0, 1), 4), range(4), np.ones(3, bool), HOT
    sampled, passes = sample(*inputs, **options)
    np.testing.assert_array_equal(sampled.tokens, in_sequence(*inputs, **options).tokens)
    assert (passes == 0).all()


def test_arguments_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="give 6 for each of 4"):
        sample(make_prompts(), range(4), drafts=np.zeros((4, 5), np.int32))
    with pytest.raises(ValueError, match="combine"):
        sample([make_prompts(), make_prompts()], range(4))
