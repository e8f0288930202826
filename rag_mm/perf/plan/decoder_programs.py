"""Lowers a decoder's training and decoding steps for a TPU topology from abstract shapes."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.decode import sampler
from rag_mm.models import ra_cm3
from rag_mm.nn import param_trees
from rag_mm.train import optimizer, train_state, train_step

BATCH_DTYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
    "roles": jnp.int8,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile.

    Attributes:
        model: the model, including remat and loss chunks.
        optimizer: optimizer of the training step.
        mesh_shape: data, fsdp, tensor.
        batch_size: global batch size, in sequences of the decoder's `max_seq_len` tokens.
        num_parts: microbatches per step.
        num_new: tokens to decode after prompts of the remaining length; 0 means the training step.
    """

    model: ra_cm3.RACM3Config
    optimizer: optimizer.OptimizerConfig
    mesh_shape: tuple[int, int, int]
    batch_size: int
    num_parts: int = 1
    num_new: int = 0


def lower_train(case: Case, mesh: Mesh) -> jax.stages.Lowered:
    """The actual training step (`train.train_step`) on abstract state and batch, with the state donated.

    Raises:
        UserError: the batch size is not divisible over mesh and microbatches.
    """
    check_case(case)
    config = case.model
    graphdef, params = param_trees.describe(partial(_make_model, config), mesh)
    tx = optimizer.make_optimizer(case.optimizer, num_steps=1_000)
    batch_sharding = NamedSharding(mesh, PartitionSpec(sharding.ACTIVATION_AXES["batch"]))
    shape = (case.batch_size, config.decoder.max_seq_len)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding)
        for name, dtype in BATCH_DTYPES.items()
    }
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(
            lambda p: train_state.TrainState(jnp.int32(0), p, tx.init(p)), params
        )
        loss_fn = partial(ra_cm3.loss_fn, config=config)
        return train_step.make_train_step(graphdef, loss_fn, tx, 0, case.num_parts).lower(
            state, batch
        )


def lower_decode(case: Case, mesh: Mesh) -> jax.stages.Lowered:
    """Prefill and decoding loop of `decode.sampler` on abstract prompts, with top-p sampling.

    Raises:
        UserError: the batch size is not divisible over the mesh, or there is no space for a prompt.
    """
    check_case(case)
    config = case.model.decoder
    length = config.max_seq_len - case.num_new
    if length < 1:
        raise UserError(
            f"{case.num_new} new tokens leave no space for a prompt in a sequence of {config.max_seq_len}."
        )
    graphdef, params = param_trees.describe(partial(_make_model, case.model), mesh)
    batch_axes = PartitionSpec(sharding.ACTIVATION_AXES["batch"])

    def spec(shape: tuple[int, ...], dtype: Any, axes: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, axes))

    tokens = spec((case.batch_size, length), jnp.int32, batch_axes)
    lengths = spec((case.batch_size,), jnp.int32, batch_axes)
    prompts = sampler.Prompts(tokens, tokens, tokens, lengths)
    seeds = spec((case.batch_size,), jnp.uint32, batch_axes)
    allowed = spec((config.vocab_size,), jnp.bool_, PartitionSpec())
    scalar = spec((), jnp.float32, PartitionSpec())
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        return sampler.lower(
            params,
            prompts,
            seeds,
            allowed,
            scalar,
            scalar,
            graphdef=graphdef,
            num_steps=case.num_new,
        )


def check_case(case: Case) -> None:
    """Checks that every dimension is divisible over the mesh.

    Raises:
        UserError: one is not; the message says which values are valid.
    """
    config, (data, fsdp, tensor) = case.model.decoder, case.mesh_shape
    for side, axis, names in (
        (fsdp, "fsdp", ("embed_dim",)),
        (tensor, "tensor", ("num_heads", "mlp_dim", "vocab_size")),
    ):
        for name in names:
            if getattr(config, name) % side:
                raise UserError(
                    f"{name} is {getattr(config, name)}, which is not divisible by the mesh's {axis}={side}."
                )
    shards = data * fsdp * case.num_parts
    if case.batch_size < 1 or case.batch_size % shards:
        raise UserError(
            f"A batch of {case.batch_size} sequences does not split over data x fsdp x parts = {shards}; "
            f"use a multiple of {shards}."
        )


def count_params(model: ra_cm3.RACM3Config) -> int:
    """Number of parameters, by abstract evaluation."""
    _, abstract = param_trees.describe(partial(_make_model, model), None)
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))


def _make_model(config: ra_cm3.RACM3Config) -> ra_cm3.Model:
    return ra_cm3.Model(config.decoder, rngs=nnx.Rngs(params=0))
