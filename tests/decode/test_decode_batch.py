"""The batch size follows memory: the bound holds for compiled programs, and the tasks follow it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.core import sharding
from rag_mm.decode import decode_batch, sampler
from rag_mm.nn import decoder, param_trees

BASE = dict(num_layers=2, embed_dim=64, num_heads=2, mlp_dim=256, max_seq_len=1024)


@pytest.mark.parametrize(
    ("vocab_size", "prompt_len", "num_steps"),
    [(512, 256, 16), (8192, 16, 16), (64, 16, 512)],
    ids=["prompt", "logits", "cache"],
)
def test_a_sequence_takes_at_most_the_bound_and_half_of_it(vocab_size, prompt_len, num_steps):
    """Measured as the difference between compiled programs of two batch sizes."""
    config = decoder.DecoderConfig(vocab_size=vocab_size, **BASE)
    graphdef, params = param_trees.describe(
        lambda: decoder.Decoder(config, rngs=nnx.Rngs(params=0)), None
    )
    scalar = jax.ShapeDtypeStruct((), jnp.float32)

    def temporary(batch_size):
        tokens = jax.ShapeDtypeStruct((batch_size, prompt_len), jnp.int32)
        rows = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
        lowered = sampler.lower(
            params,
            sampler.Prompts(tokens, tokens, tokens, rows),
            jax.ShapeDtypeStruct((batch_size,), jnp.uint32),
            jax.ShapeDtypeStruct((vocab_size,), jnp.bool_),
            scalar,
            scalar,
            graphdef=graphdef,
            num_steps=num_steps,
        )
        memory = lowered.compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    each = (temporary(24) - temporary(8)) / 16
    bound = decode_batch.bytes_per_sequence(config, prompt_len, num_steps)
    assert bound / 2.5 < each <= bound


def test_as_many_sequences_as_fit_are_a_power_of_two_and_at_least_one():
    config = decoder.DecoderConfig(vocab_size=64, **BASE)
    each = decode_batch.bytes_per_sequence(config, 64, 64)
    fit = lambda available, **options: decode_batch.sequences_that_fit(
        config, 64, 64, available, **options
    )
    assert [fit(n * each) for n in (0, 0.5, 1, 3, 4, 100)] == [1, 1, 1, 2, 4, 64]
    assert fit(100 * each, num_streams=2) == 32
    wide = decoder.DecoderConfig(vocab_size=4096, **BASE)
    sizes = [decode_batch.bytes_per_sequence(wide, 64, 64, n) for n in (1, 64)]
    assert sizes[1] - sizes[0] > 63 * 32 * 4096  # logits
    assert decode_batch.sequences_that_fit(config, 64, 900, 100 * each) < 64


def test_the_7b_model_of_the_paper_does_not_decode_64_sequences_in_80_gb():
    config = decoder.DecoderConfig(
        vocab_size=65_536,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        mlp_dim=16_384,
        max_seq_len=4096,
        dtype="bfloat16",
    )
    free = 80e9 - 14e9
    assert 1 < decode_batch.sequences_that_fit(config, 2295, 1024, free) < 64


class FakeDevice(types.SimpleNamespace):
    def memory_stats(self):
        return {"bytes_limit": self.limit, "bytes_in_use": self.used}


def test_a_device_with_statistics_decides_by_its_free_memory(monkeypatch):
    config = decoder.DecoderConfig(vocab_size=64, **BASE)
    each = decode_batch.bytes_per_sequence(config, 64, 64)
    device = FakeDevice(platform="gpu", id=0, limit=1000 * each, used=880 * each)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    host = {"kernel": np.zeros(1)}
    assert decode_batch.batch_size(config, host, 64, 64) == 64  # 0.8 x 120
    device.used = 0
    assert decode_batch.batch_size(config, host, 64, 64) == decode_batch.DEVICE_BATCH


def test_a_cpu_has_a_fixed_budget_on_each_part_of_a_mesh(monkeypatch):
    config = decoder.DecoderConfig(vocab_size=64, **BASE)
    each = decode_batch.bytes_per_sequence(config, 64, 64)
    layout = jax.NamedSharding(sharding.make_mesh(2, 2, 2), jax.P())
    one, eight = jnp.zeros(1), jax.device_put(jnp.zeros(1), layout)
    sizes = lambda: [decode_batch.batch_size(config, {"x": x}, 64, 64) for x in (one, eight)]
    assert sizes() == [decode_batch.CPU_BATCH, 4 * decode_batch.CPU_BATCH]
    monkeypatch.setattr(decode_batch, "CPU_BYTES", 5 * each)
    assert sizes() == [4, 16]
