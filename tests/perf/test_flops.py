"""FLOPs counted by hand against what XLA counts in an unscanned program, and against 6 N D."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from rag_mm.models import cm3leon
from rag_mm.nn import decoder
from rag_mm.perf import flops

SHAPE = decoder.DecoderConfig(1024, 1, 256, 4, 512, 64, num_kv_heads=2, norm="layernorm_no_params")


@pytest.mark.parametrize("mlp", ["swiglu", "relu"])
def test_forward_flops_are_those_that_xla_counts(mlp):
    """XLA computes every score, the masked ones too; its elementwise work is under a tenth here."""
    config = dataclasses.replace(SHAPE, mlp=mlp)
    graphdef, params = nnx.split(
        jax.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0))), nnx.Param
    )
    ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def forward(params, ids):
        model = nnx.merge(graphdef, params)
        return model.logits(model(ids, ids, ids))

    counted = jax.jit(forward).lower(params, ids).compile().cost_analysis()["flops"]
    masked = 4 * 4 * 64 * (64 - 65 / 2)
    expected = 2 * 64 * (flops.forward_flops(config, 64) + masked)
    assert expected <= counted * 1.02 and counted < 1.1 * expected


def test_a_7b_token_costs_six_flops_a_weight_and_its_scores():
    config = cm3leon.CM3LeonConfig.b7().decoder
    weights = flops.multiplied_params(config)
    assert weights == 32 * 12 * 4096**2 + 65_536 * 4096
    scores = 12 * 32 * 4096 * 4097 / 2
    assert flops.train_flops(config, 4096) == 6 * weights + scores


def test_remat_and_chunks_cost_the_chip_and_not_the_model():
    config = dataclasses.replace(SHAPE, remat="full")
    model, head = flops.train_flops(config, 64), 2 * 1024 * 256
    assert flops.train_flops(SHAPE, 64) == model
    assert flops.hardware_flops(SHAPE, 64, False) == model
    assert flops.hardware_flops(SHAPE, 64, True) == model + head
    assert flops.hardware_flops(config, 64, False) == pytest.approx(model * 4 / 3 - head)
    assert flops.decode_flops(SHAPE, 64) - flops.decode_flops(SHAPE, 63) == 4 * 4 * 64
