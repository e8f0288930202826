"""The training step compiles for four TPU chips, with the real TPU compiler, on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rag_mm.core import sharding
from rag_mm.models import ra_cm3
from rag_mm.nn import decoder, param_trees
from rag_mm.train import optimizer, train_state, train_step

pytestmark = pytest.mark.slow

CONFIG = ra_cm3.RACM3Config(
    decoder.DecoderConfig(
        vocab_size=1024,
        num_layers=2,
        embed_dim=256,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=512,
        max_seq_len=256,
        qk_norm=True,
        smear_lags=((1, 2), (1, 7, 8, 9)),
        dtype="bfloat16",
    ),
    code_offset=512,
)
BATCH, LENGTH = 8, 256


@pytest.fixture(scope="module")
def topology():
    pytest.importorskip("libtpu")
    return topologies.get_topology_desc("v5e:2x2", platform="tpu")


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1), (1, 2, 2)], ids=str)
def test_train_step_compiles_for_four_chips(topology, shape):
    devices = np.array(topology.devices).reshape(shape)
    mesh = Mesh(devices, sharding.MESH_AXES, axis_types=(AxisType.Explicit,) * 3)
    make_model = lambda: ra_cm3.Model(CONFIG.decoder, rngs=nnx.Rngs(params=0))
    graphdef, params = param_trees.describe(make_model, mesh)
    tx = optimizer.make_optimizer(optimizer.OptimizerConfig(), num_steps=10)
    loss_fn = functools.partial(ra_cm3.loss_fn, config=CONFIG)
    batch_sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    batch = {
        name: jax.ShapeDtypeStruct((BATCH, LENGTH), dtype, sharding=batch_sharding)
        for name, dtype in {
            "tokens": jnp.int32,
            "targets": jnp.int32,
            "positions": jnp.int32,
            "segment_ids": jnp.int32,
            "roles": jnp.int8,
        }.items()
    }
    with jax.set_mesh(mesh):
        state = jax.eval_shape(
            lambda p: train_state.TrainState(jnp.int32(0), p, tx.init(p)), params
        )
        step = train_step.make_train_step(graphdef, loss_fn, tx, seed=0)
        # Lowering the bfloat16 gradient of jax's own attention mixes it with float32.
        with jax.numpy_dtype_promotion("standard"):
            compiled = step.lower(state, batch).compile()

    memory = compiled.memory_analysis()
    whole = 3 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    # Parameters and both moments are sharded over fsdp and tensor and updated in place; norms are replicated.
    share = whole / (shape[1] * shape[2])
    assert share <= memory.alias_size_in_bytes < 1.3 * share
    assert memory.argument_size_in_bytes >= memory.alias_size_in_bytes
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert share < needed < 1 << 30  # Bytes on one chip, which has 16 GiB.
    text = compiled.as_text()
    assert "all-reduce" in text or "reduce-scatter" in text
    assert ("all-gather" in text) == (shape[1] * shape[2] > 1)
