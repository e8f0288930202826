"""Completions of any number of prompts and tokens, compiled once per bucket."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from rag_mm.decode import decode_batch, sampler
from rag_mm.frozen_lm import language_model
from rag_mm.nn import decoder, param_trees

CONFIG = decoder.DecoderConfig(
    vocab_size=24, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16, max_seq_len=64
)


@pytest.fixture(scope="module")
def model():
    make_model = lambda: decoder.Decoder(CONFIG, rngs=nnx.Rngs(params=0))
    graphdef, abstract = param_trees.describe(make_model, None)
    rng = np.random.default_rng(0)
    random = lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32)
    params = jax.tree.map(random, abstract)
    return language_model.LanguageModel(CONFIG, graphdef, params, None, ())


def prompts(*lengths):
    rng = np.random.default_rng(1)
    return [rng.integers(24, size=length).tolist() for length in lengths]


def test_one_program_per_bucket_of_batch_prompt_and_new_tokens(model):
    def new_programs(lengths, num_tokens, **options):
        before = sampler._sample._cache_size()
        tokens = model.generate(prompts(*lengths), num_tokens=num_tokens, **options).tokens
        assert [len(t) for t in tokens] == [num_tokens] * len(lengths)
        return sampler._sample._cache_size() - before

    assert new_programs([3, 5, 7], 5) == 1
    assert new_programs([1, 16, 2, 9], 16) == 0  # 3 and 4 prompts, lengths to 16, 1 to 16 tokens
    assert new_programs([4, 4, 4], 1, seed=9) == 0
    assert new_programs([4, 4], 5) == 1  # two prompts
    assert new_programs([17, 4, 4], 5) == 1  # a longer prompt
    assert new_programs([4, 4, 4], 17) == 1  # more tokens
    assert new_programs([4, 4, 4], 5, temperature=0.5) == 1  # sampled, not greedy
    assert new_programs([4, 4, 4], 7, temperature=0.9) == 0


def test_a_completion_does_not_depend_on_its_bucket_or_on_memory(model, monkeypatch):
    batch = prompts(3, 5, 16, 7)
    options = dict(num_tokens=20, temperature=1.0, seed=3)
    together = model.generate(batch, **options).tokens
    longer = model.generate([*batch, *prompts(30)], **options).tokens
    assert longer[:4] == together
    assert [t[:3] for t in together] == model.generate(batch, **options | {"num_tokens": 3}).tokens
    called = []
    real = sampler.sample
    monkeypatch.setattr(decode_batch, "CPU_BYTES", 1)
    monkeypatch.setattr(
        sampler, "sample", lambda *args, **kw: called.append(len(args[2])) or real(*args, **kw)
    )
    assert model.generate(batch, **options).tokens == together
    assert called == [1, 1, 1, 1]


def test_on_several_devices_it_says_the_same(model):
    mesh = decode_batch.make_mesh((2, 1, 2))
    abstract = param_trees.describe(lambda: decoder.Decoder(CONFIG, rngs=nnx.Rngs(params=0)), mesh)[
        1
    ]
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), model.params, abstract)
    split = dataclasses.replace(model, params=placed)
    batch = prompts(3, 5, 7)
    assert split.generate(batch, num_tokens=5).tokens == model.generate(batch, num_tokens=5).tokens
    tokens = np.array(prompts(6, 6, 6))
    np.testing.assert_allclose(split.logits(tokens), model.logits(tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("count", "size"), [(1, 16), (17, 32), (33, 48), (49, 64), (65, 96), (97, 128)]
)
def test_buckets(count, size):
    assert language_model._bucket(count) == size
