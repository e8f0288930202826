"""Training and decoding steps lowered for chips that are not here: shapes in, one compiled program out."""

import dataclasses
import functools
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.decode import sampler
from rag_mm.models import ra_cm3
from rag_mm.nn import param_trees
from rag_mm.perf import chips
from rag_mm.train import optimizer, train_step
from rag_mm.train import train_state as state

ROW = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
    "roles": jnp.int8,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled.

    Attributes:
        model: the model, its remat and loss chunks included.
        optimizer: of the training step.
        mesh_shape: data, fsdp, tensor.
        batch_size: rows of `model.decoder.max_seq_len` tokens, on all chips together.
        num_parts: parts into which a step cuts its batch.
        num_new: tokens to decode behind prompts that leave room for them; 0 is the training step.
    """

    model: ra_cm3.RACM3Config
    optimizer: optimizer.OptimizerConfig
    mesh_shape: tuple[int, int, int]
    batch_size: int
    num_parts: int = 1
    num_new: int = 0


def make_mesh(topology: chips.Topology, mesh_shape: tuple[int, int, int]) -> Mesh:
    """The mesh over a topology's chips; slices lie along `data`.

    Raises:
        UserError: the shape does not hold the chips, or libtpu is missing or knows no such topology.
    """
    if math.prod(mesh_shape) != topology.num_chips or mesh_shape[0] % topology.num_slices:
        raise UserError(
            f"A mesh {'x'.join(map(str, mesh_shape))} does not fit {topology.num_slices} x "
            f"{topology.name}: its product is the number of chips, {topology.num_chips}, and its "
            "first side a multiple of the slices."
        )
    options = dict(topology.chip.options, num_slices=topology.num_slices)
    try:
        found = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    except Exception as error:  # libtpu raises whatever its C++ side does.
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"The TPU compiler gives no topology {topology.name} ({reason}); pip install 'rag_mm[tpu]'."
        ) from error
    devices = sorted(found.devices, key=lambda d: (getattr(d, "slice_index", 0) or 0, d.id))
    per_slice = (mesh_shape[0] // topology.num_slices, *mesh_shape[1:])
    slices = np.array(devices).reshape(topology.num_slices, -1)
    grids = [
        mesh_utils.create_device_mesh(per_slice, list(each), allow_split_physical_axes=True)
        for each in slices
    ]
    return Mesh(np.concatenate(grids), sharding.MESH_AXES, axis_types=(AxisType.Explicit,) * 3)


def lower_train(case: Case, mesh: Mesh) -> jax.stages.Lowered:
    """The real training step (`train.train_step`) on abstract state and batch, state donated.

    Raises:
        UserError: the batch does not split over the mesh and the parts.
    """
    check_case(case)
    config = case.model
    graphdef, params = param_trees.describe(partial(_make_model, config), mesh)
    tx = optimizer.make_optimizer(case.optimizer, num_steps=1_000)
    batch_sharding = NamedSharding(mesh, PartitionSpec(sharding.ACTIVATION_AXES["batch"]))
    shape = (case.batch_size, config.decoder.max_seq_len)
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding)
        for name, dtype in ROW.items()
    }
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        train_state = jax.eval_shape(
            lambda p: state.TrainState(jnp.int32(0), p, tx.init(p)), params
        )
        loss_fn = partial(ra_cm3.loss_fn, config=config)
        return train_step.make_train_step(graphdef, loss_fn, tx, 0, case.num_parts).lower(
            train_state, batch
        )


def lower_decode(case: Case, mesh: Mesh) -> jax.stages.Lowered:
    """Prefill and the loop of `decode.sampler` on abstract prompts, with top-p sampling.

    Raises:
        UserError: the batch does not split over the mesh, or no room is left for a prompt.
    """
    check_case(case)
    config = case.model.decoder
    length = config.max_seq_len - case.num_new
    if length < 1:
        raise UserError(f"{case.num_new} new tokens leave no room for a prompt in {length}.")
    graphdef, params = param_trees.describe(partial(_make_model, case.model), mesh)
    rows = PartitionSpec(sharding.ACTIVATION_AXES["batch"])

    def spec(shape: tuple[int, ...], dtype: Any, where: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, where))

    wide = spec((case.batch_size, length), jnp.int32, rows)
    narrow = spec((case.batch_size,), jnp.int32, rows)
    prompts = sampler.Prompts(wide, wide, wide, narrow)
    seeds = spec((case.batch_size,), jnp.uint32, rows)
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
    """Refuses what some chip would get no whole share of.

    Raises:
        UserError: it says which numbers would do.
    """
    config, (data, fsdp, tensor) = case.model.decoder, case.mesh_shape
    for side, axis, names in (
        (fsdp, "fsdp", ("embed_dim",)),
        (tensor, "tensor", ("num_heads", "mlp_dim", "vocab_size")),
    ):
        for name in names:
            if getattr(config, name) % side:
                raise UserError(
                    f"{name} is {getattr(config, name)}, which {axis}={side} of the mesh does not divide."
                )
    shards = data * fsdp * case.num_parts
    if case.batch_size < 1 or case.batch_size % shards:
        raise UserError(
            f"A batch of {case.batch_size} rows does not split over data x fsdp x parts = {shards}; "
            f"give a multiple of {shards}."
        )


@functools.cache
def hbm_bytes(topology: chips.Topology) -> int:
    """What a program may use of one chip, asked of the compiler: it refuses one that is far too large."""
    mesh = make_mesh(topology, (topology.num_slices, topology.num_chips // topology.num_slices, 1))
    huge = jax.ShapeDtypeStruct(
        (1 << 20, 1 << 20), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    try:
        jax.jit(jnp.negative).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        found = read_refusal(str(error))
        if found is None:
            raise
        return found[1]
    raise RuntimeError(f"the compiler puts 4 TiB onto one chip of {topology.name}")


def read_refusal(message: str) -> tuple[int, int] | None:
    """Bytes wanted and bytes there are, in the compiler's own words; None: not about memory."""
    size = r"([\d.]+)([KMGT])"
    found = re.search(rf"Used {size} of {size} hbm", message) or re.search(
        rf"temporaries \({size}\) exceeds available HBM \({size}\)", message
    )
    if found is None:
        return None
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    wanted, unit, limit, limit_unit = found.groups()
    return int(float(wanted) * units[unit]), int(float(limit) * units[limit_unit])


def count_params(model: ra_cm3.RACM3Config) -> int:
    """Of the whole model, by abstract evaluation."""
    _, abstract = param_trees.describe(partial(_make_model, model), None)
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))


def _make_model(config: ra_cm3.RACM3Config) -> ra_cm3.Model:
    return ra_cm3.Model(config.decoder, rngs=nnx.Rngs(params=0))
