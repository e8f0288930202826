"""Training steps at scale: parameter specs, remat and loss chunks, microbatches, bfloat16."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from rag_mm.core import sharding
from rag_mm.models import ra_cm3
from rag_mm.nn import decoder, param_trees
from rag_mm.train import optimizer, train_state, train_step

CONFIG = ra_cm3.RACM3Config(
    decoder.DecoderConfig(
        vocab_size=48,
        num_layers=2,
        embed_dim=16,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=32,
        max_seq_len=12,
        norm="layernorm",
        positions="learned",
        qk_norm=True,
        smear_lags=((1,),),
        use_bias=True,
        init=decoder.InitConfig(std=0.2),
    ),
    code_offset=32,
)
BLOCKS = "stack/blocks"
# Every parameter of the fullest family; a new one fails until its layout is written down here.
SPECS = {
    "embedding/table": ("tensor", "fsdp"),
    "head/table": ("tensor", "fsdp"),
    "position_embedding/table": (None, "fsdp"),
    "norm/scale": (None,),
    "norm/bias": (None,),
    f"{BLOCKS}/attention/q/kernel": (None, "fsdp", "tensor", None),
    f"{BLOCKS}/attention/k/kernel": (None, "fsdp", "tensor", None),
    f"{BLOCKS}/attention/v/kernel": (None, "fsdp", "tensor", None),
    f"{BLOCKS}/attention/out/kernel": (None, "tensor", None, "fsdp"),
    f"{BLOCKS}/attention/q/bias": (None, "tensor", None),
    f"{BLOCKS}/attention/k/bias": (None, "tensor", None),
    f"{BLOCKS}/attention/v/bias": (None, "tensor", None),
    f"{BLOCKS}/attention/out/bias": (None, "fsdp"),
    f"{BLOCKS}/attention/q_norm/scale": (None, None),
    f"{BLOCKS}/attention/k_norm/scale": (None, None),
    f"{BLOCKS}/attention/q_smear": (None, "tensor"),
    f"{BLOCKS}/attention/k_smear": (None, "tensor"),
    f"{BLOCKS}/attention_norm/scale": (None, None),
    f"{BLOCKS}/attention_norm/bias": (None, None),
    f"{BLOCKS}/mlp_norm/scale": (None, None),
    f"{BLOCKS}/mlp_norm/bias": (None, None),
    f"{BLOCKS}/mlp/gate/kernel": (None, "fsdp", "tensor"),
    f"{BLOCKS}/mlp/up/kernel": (None, "fsdp", "tensor"),
    f"{BLOCKS}/mlp/down/kernel": (None, "tensor", "fsdp"),
    f"{BLOCKS}/mlp/gate/bias": (None, "tensor"),
    f"{BLOCKS}/mlp/up/bias": (None, "tensor"),
    f"{BLOCKS}/mlp/down/bias": (None, "fsdp"),
}
OPTIMIZER = optimizer.make_optimizer(
    optimizer.OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1), num_steps=9
)


def make_model(config=CONFIG):
    return ra_cm3.Model(config.decoder, rngs=nnx.Rngs(params=0))


def make_batch(num_rows=8, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(48, size=(num_rows, 13)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(12, dtype=np.int32), (num_rows, 1)),
        "segment_ids": (np.arange(12) < rng.integers(6, 13, (num_rows, 1))).astype(np.int32),
        "roles": rng.integers(3, size=(num_rows, 12)).astype(np.int8),
    }


def replace(remat="none", dtype="float32", loss_chunks=1):
    shape = dataclasses.replace(CONFIG.decoder, remat=remat, dtype=dtype)
    return dataclasses.replace(CONFIG, decoder=shape, loss_chunks=loss_chunks)


@functools.cache
def fresh():
    return jax.device_get(param_trees.init_params(make_model, sharding.make_mesh()))


def names_of(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def take_step(config, mesh_shape=(1, 1, 1), num_parts=1, batch=None):
    """The state before and after one step, its metrics and the compiled program."""
    mesh = sharding.make_mesh(*mesh_shape)
    graphdef, abstract = param_trees.describe(functools.partial(make_model, config), mesh)
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), fresh(), abstract)
    loss_fn = functools.partial(ra_cm3.loss_fn, config=config)
    step = train_step.make_train_step(graphdef, loss_fn, OPTIMIZER, 0, num_parts)
    before = train_state.init_state(params, OPTIMIZER, mesh)
    # Lowering the bfloat16 gradient of jax's own attention mixes it with float32.
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        placed = sharding.put_batch(make_batch() if batch is None else batch, mesh)
        program = step.lower(before, placed).compile()
        after, metrics = program(before, placed)
    return before, after, {k: float(a / b) for k, (a, b) in metrics.items()}, program


def first_moment(state):
    """A tenth of the clipped gradient after one step."""
    return jax.device_get(optax.tree_utils.tree_get(state.opt_state, "mu"))


def assert_close(left, right, atol):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol), left, right)


def test_every_parameter_and_moment_has_the_spec_it_should():
    """In the abstract state, and in the state returned by a compiled step on 2x2x2."""
    _, after, _, _ = eight()
    _, abstract = param_trees.describe(make_model, sharding.make_mesh(2, 2, 2))
    adam = optax.tree_utils.tree_get(after.opt_state, "ScaleByAdamState")
    for tree in (abstract, after.params, adam.mu, adam.nu):
        found = {name: leaf.sharding.spec for name, leaf in names_of(tree).items()}
        assert found == {name: PartitionSpec(*axes) for name, axes in SPECS.items()}


@functools.cache
def eight():
    return take_step(replace("full", "bfloat16", 4), (2, 2, 2))


def test_the_state_is_updated_in_place():
    """In the compiled program every leaf of the state, and nothing else, is aliased to its successor."""
    before, after, _, program = eight()
    header = program.as_text().split("\n", 1)[0]
    table = header.split("input_output_alias={ ", 1)[1].split(" }, entry")[0]
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}, (?:may|must)-alias\)", table)
    num_leaves = len(jax.tree.leaves(after))
    assert [(int(out or 0), int(into)) for out, into in pairs] == [
        (i, i) for i in range(num_leaves)
    ]
    local = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(after))
    assert program.memory_analysis().alias_size_in_bytes == local
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


def test_gradients_of_the_program_are_reduce_scattered():
    _, _, _, program = eight()
    text = program.as_text()
    assert "reduce-scatter" in text
    # Summed whole are norms and biases, and what a few numbers long metrics are.
    for line in text.splitlines():
        if " all-reduce(" in line and "replica_groups" in line and "f32[2,16,32]" in line:
            raise AssertionError(line)


@pytest.fixture(scope="module")
def plain():
    return take_step(CONFIG)


@pytest.mark.parametrize(
    ("remat", "loss_chunks"), [("dots", 3), pytest.param("full", 1, marks=pytest.mark.slow)]
)
def test_remat_and_chunks_change_only_memory(plain, remat, loss_chunks):
    _, after, metrics, _ = take_step(replace(remat, loss_chunks=loss_chunks))
    assert metrics == pytest.approx(plain[2], abs=1e-5)
    assert_close(first_moment(after), first_moment(plain[1]), 1e-5)


def test_remat_reduces_memory():
    """In a deep stack: none keeps all activations, dots the matrix products, full only the layer inputs."""
    sizes = []
    for remat in ("none", "dots", "full"):
        shape = decoder.DecoderConfig(64, 8, 64, 4, 256, 64, remat=remat)
        graphdef, params = nnx.split(
            jax.eval_shape(lambda s=shape: decoder.Decoder(s, rngs=nnx.Rngs(0))), nnx.Param
        )
        ids = jax.ShapeDtypeStruct((16, 64), jnp.int32)

        def loss(params, ids, graphdef=graphdef):
            return jnp.square(nnx.merge(graphdef, params)(ids, ids, ids)).sum()

        program = jax.jit(jax.grad(loss)).lower(params, ids).compile()
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    assert sizes[0] > 1.2 * sizes[1] and sizes[1] > 2 * sizes[2]


@pytest.mark.parametrize(
    ("mesh", "num_parts"), [((1, 1, 1), 4), pytest.param((2, 2, 1), 2, marks=pytest.mark.slow)]
)
def test_microbatches_add_up_to_the_step_of_the_whole_batch(plain, mesh, num_parts):
    """Even though microbatches have different numbers of targets, and some none."""
    batch = make_batch()
    batch["roles"][::4] = 0
    whole = take_step(CONFIG, batch=batch)
    parts = take_step(CONFIG, mesh, num_parts, batch)
    assert parts[2] == pytest.approx(whole[2], abs=1e-5)
    assert_close(first_moment(parts[1]), first_moment(whole[1]), 1e-5)
    assert whole[2]["loss"] != pytest.approx(plain[2]["loss"], abs=1e-4)


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="8 does not split into 3"):
        take_step(CONFIG, num_parts=3)


def test_bfloat16_computes_on_float32_masters(plain):
    """Close to the float32 step; all state kept between steps is float32."""
    _, after, metrics, _ = eight()
    for name, leaf in names_of((after.params, after.opt_state)).items():
        assert leaf.dtype in (jnp.float32, jnp.int32), name
    assert metrics["loss"] == pytest.approx(plain[2]["loss"], rel=0.02)
    assert metrics["loss"] != plain[2]["loss"]
    exact, found = first_moment(plain[1]), first_moment(after)
    difference = optax.global_norm(jax.tree.map(np.subtract, found, exact))
    assert difference < 0.05 * optax.global_norm(exact)
