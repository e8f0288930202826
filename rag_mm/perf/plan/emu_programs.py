"""Emu's training step, with its image tower, as a program to compile for a TPU topology (configs/emu.py)."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rag_mm.core import configuration, sharding
from rag_mm.core.errors import UserError
from rag_mm.models.emu import emu_model, emu_objective
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.nn import param_trees
from rag_mm.perf import chips
from rag_mm.perf.plan import cases, decoder_programs, programs
from rag_mm.train import train_state, train_step
from rag_mm.train.optimizer import OptimizerConfig, make_optimizer

FAMILY = "emu"


@dataclasses.dataclass(frozen=True)
class EmuPlanPage:
    """A page of an Emu at one size, to compile for a TPU topology.

    Attributes:
        family: the word emu.
        model: the model and its loss; a row has as many tokens as the decoder has positions.
        optimizer: as published.
        num_steps: training steps, as published.
        batch_size: rows a step.
        num_images: images in a row.
        accumulate: parts that a step's batch is split into.
    """

    family: str
    model: EmuConfig
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    num_steps: int = 1
    batch_size: int = 1
    num_images: int = 1
    accumulate: int = 1


def sections(page: Mapping[str, Any]) -> dict[str, configuration.Section]:
    """The dataclasses that define such a page."""
    del page
    return {
        "": configuration.Section(EmuPlanPage, ("model", "optimizer")),
        "model": configuration.Section(EmuConfig),
        "optimizer": configuration.Section(OptimizerConfig),
    }


@dataclasses.dataclass(frozen=True)
class EmuCase:
    """What is planned: a page, and its mesh (data, fsdp, tensor)."""

    page: EmuPlanPage
    mesh_shape: tuple[int, int, int]


def make_case(
    config: Mapping[str, Any],
    topology: chips.Topology,
    *,
    batch_size: int | None = None,
    num_parts: int | None = None,
    remat: str | None = None,
    mesh: str | None = None,
) -> EmuCase:
    """The page's model on a topology; None means the page's value, or a mesh of fsdp alone.

    Raises:
        UserError: a value is invalid, or the batch does not split over the mesh.
    """
    values = configuration.fill(config, sections)
    page = configuration.make(EmuPlanPage, values, "the page")
    decoder = dataclasses.replace(page.model.decoder, remat=remat or page.model.decoder.remat)
    page = dataclasses.replace(
        page,
        model=dataclasses.replace(page.model, decoder=decoder),
        batch_size=batch_size or page.batch_size,
        accumulate=num_parts or page.accumulate,
    )
    num_chips, tower = topology.num_chips // topology.num_slices, page.model.vision.vision
    fits = lambda n: not (num_chips % n or decoder.embed_dim % n or tower.embed_dim % n)
    widest = max(n for n in range(1, num_chips + 1) if fits(n))
    shape = (topology.num_chips // widest, widest, 1) if mesh is None else cases.parse_mesh(mesh)
    shards = shape[0] * shape[1] * page.accumulate
    if page.batch_size % shards:
        raise UserError(
            f"A batch of {page.batch_size} rows does not split over data x fsdp x parts = {shards}; use a "
            f"multiple of {shards}."
        )
    return EmuCase(page, shape)


def make_program(case: EmuCase) -> programs.Program:
    """The case as a program to compile; its costs are not estimated."""
    page = case.page
    return programs.Program(
        partial(lower_train, case),
        case.mesh_shape,
        lambda compiled: None,
        {
            "num_params": count_params(page.model),
            "program": "train",
            "batch_size": page.batch_size,
            "num_parts": page.accumulate,
            "seq_len": page.model.decoder.max_seq_len,
            "num_images": page.num_images,
            "remat": page.model.decoder.remat,
            "loss_chunks": page.model.loss_chunks,
        },
    )


def vary(
    case: EmuCase, topology: chips.Topology, remat: str, num_parts: int
) -> programs.Program | None:
    """The program with other remat and parts; None if the batch does not split."""
    decoder = dataclasses.replace(case.page.model.decoder, remat=remat)
    emu = dataclasses.replace(case.page.model, decoder=decoder)
    data, fsdp, _ = case.mesh_shape
    if case.page.batch_size % (data * fsdp * num_parts):
        return None
    page = dataclasses.replace(case.page, model=emu, accumulate=num_parts)
    return make_program(dataclasses.replace(case, page=page))


def lower_train(case: EmuCase, mesh: Mesh) -> jax.stages.Lowered:
    """The training step on abstract state and batch, of pixels where the tower is a part of the model.

    Raises:
        UserError: a parameter does not split over the mesh.
    """
    page, emu = case.page, case.page.model
    graphdef, params = param_trees.describe(partial(make_model, emu), mesh)
    param_trees.check_split(params, "Give another --mesh")
    tx = make_optimizer(page.optimizer, page.num_steps)
    layout = NamedSharding(mesh, PartitionSpec(sharding.ACTIVATION_AXES["batch"]))
    make = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
    rows = (page.batch_size, emu.decoder.max_seq_len)
    types = {**decoder_programs.BATCH_DTYPES, "slot": jnp.int32}
    batch = {name: make(rows, dtype) for name, dtype in types.items()}
    per_image = (page.batch_size, page.num_images)
    vision = emu.vision
    if emu.has_tower:
        pixels = (*per_image, vision.image_size, vision.image_size, 3)
        batch["images"] = make(pixels, jnp.uint8)
    else:
        tokens = (*per_image, vision.num_tokens, vision.vision.embed_dim)
        batch["image_tokens"] = make(tokens, jnp.float16)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(
            lambda p: train_state.TrainState(jnp.int32(0), p, tx.init(p)), params
        )
        step = train_step.make_train_step(graphdef, emu_objective.loss_fn, tx, 0, page.accumulate)
        return step.lower(state, batch)


def count_params(config: EmuConfig) -> int:
    """Number of parameters, by abstract evaluation."""
    _, abstract = param_trees.describe(partial(make_model, config), None)
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))


def make_model(config: EmuConfig) -> emu_model.Emu:
    """The model with the initial parameters of seed 0."""
    return emu_model.Emu(config, rngs=nnx.Rngs(params=0))
