"""Emu's visual decoder's training step as a program to compile for a TPU topology (configs/emu.py:sd15)."""

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
from rag_mm.models.emu import visual_decoder
from rag_mm.models.emu.visual_decoder import VisualDecoderConfig
from rag_mm.nn import param_trees
from rag_mm.perf import chips
from rag_mm.perf.plan import programs, traffic
from rag_mm.train import train_state, train_step
from rag_mm.train.optimizer import OptimizerConfig, make_optimizer

FAMILY = "emu_visual"


@dataclasses.dataclass(frozen=True)
class VisualPlanPage:
    """A page of a visual decoder at one size, to compile for a TPU topology.

    Attributes:
        family: the word emu_visual.
        model: the network and its frozen autoencoder.
        optimizer: as published.
        num_steps: training steps, as published.
        batch_size: images a step.
        accumulate: parts that a step's batch is split into.
    """

    family: str
    model: VisualDecoderConfig
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    num_steps: int = 1
    batch_size: int = 1
    accumulate: int = 1


def sections(page: Mapping[str, Any]) -> dict[str, configuration.Section]:
    """The dataclasses that define such a page."""
    del page
    return {
        "": configuration.Section(VisualPlanPage, ("model", "optimizer")),
        "model": configuration.Section(VisualDecoderConfig),
        "optimizer": configuration.Section(OptimizerConfig),
    }


@dataclasses.dataclass(frozen=True)
class VisualCase:
    """What is planned: a page, and its mesh (data, fsdp, tensor)."""

    page: VisualPlanPage
    mesh_shape: tuple[int, int, int]


def make_case(
    config: Mapping[str, Any],
    topology: chips.Topology,
    *,
    batch_size: int | None = None,
    num_parts: int | None = None,
    mesh_shape: tuple[int, int, int] | None = None,
) -> VisualCase:
    """The page's model on a topology; None means the page's value, or all chips along data.

    Raises:
        UserError: a value is invalid, or the batch does not split over the mesh.
    """
    values = configuration.fill(config, sections)
    page = configuration.make(VisualPlanPage, values, "the page")
    page = dataclasses.replace(
        page,
        batch_size=batch_size or page.batch_size,
        accumulate=num_parts or page.accumulate,
    )
    case = VisualCase(page, mesh_shape or (topology.num_chips, 1, 1))
    shards = _shards(case)
    if page.batch_size % shards:
        raise UserError(
            f"A batch of {page.batch_size} images does not split over data x fsdp x parts = {shards}; use a "
            f"multiple of {shards}."
        )
    return case


def make_program(case: VisualCase, topology: chips.Topology) -> programs.Program:
    """The case as a program to compile; FLOPs and memory traffic are the compiler's counts, of one part."""
    page = case.page

    def costs(compiled: programs.Compiled) -> programs.Costs | None:
        if compiled.flops is None or compiled.moved_bytes is None:
            return None
        each = compiled.flops * page.accumulate * topology.num_chips / page.batch_size
        dcn = traffic.gradient_bytes(_num_trained(page), case.mesh_shape, topology.num_slices)
        moved = compiled.moved_bytes * page.accumulate
        return programs.Costs("image", page.batch_size, each, each, moved, dcn * page.accumulate)

    return programs.Program(
        partial(lower_train, case),
        case.mesh_shape,
        costs,
        {
            "num_params": sum(leaf.size for leaf in jax.tree.leaves(_describe(page)[1])),
            "program": "train",
            "batch_size": page.batch_size,
            "num_parts": page.accumulate,
            "image_size": page.model.image_size,
            "codes_per_image": page.model.num_slots,
            "remat": "none",
        },
    )


def vary(
    case: VisualCase, topology: chips.Topology, remat: str, num_parts: int
) -> programs.Program | None:
    """The program with other parts; None with remat, which the networks have not, or if it does not split."""
    page = dataclasses.replace(case.page, accumulate=num_parts)
    other = dataclasses.replace(case, page=page)
    if remat != "none" or page.batch_size % _shards(other):
        return None
    return make_program(other, topology)


def lower_train(case: VisualCase, mesh: Mesh) -> jax.stages.Lowered:
    """The training step on abstract state and batch.

    Raises:
        UserError: a parameter does not split over the mesh.
    """
    page, model = case.page, case.page.model
    graphdef, params = _describe(page, mesh)
    param_trees.check_split(params, "Give another --mesh")
    frozen, trained = param_trees.split(params, visual_decoder.is_fitted)
    tx = make_optimizer(page.optimizer, page.num_steps)
    step = train_step.make_train_step(graphdef, visual_decoder.loss_fn, tx, 0, page.accumulate)
    layout = NamedSharding(mesh, PartitionSpec(sharding.ACTIVATION_AXES["batch"]))
    spec = lambda dtype, *shape: jax.ShapeDtypeStruct(
        (page.batch_size, *shape), dtype, sharding=layout
    )
    batch = {
        "images": spec(jnp.uint8, model.image_size, model.image_size, 3),
        "condition": spec(jnp.float16, model.num_slots, model.condition_dim),
    }
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(
            lambda p: train_state.TrainState(jnp.int32(0), p, tx.init(p)), trained
        )
        return step.lower(state, batch, held=frozen)


def _describe(
    page: VisualPlanPage, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef, param_trees.Params]:
    return param_trees.describe(partial(_make_model, page.model), mesh)


def _num_trained(page: VisualPlanPage) -> int:
    _, trained = param_trees.split(_describe(page)[1], visual_decoder.is_fitted)
    return sum(leaf.size for leaf in jax.tree.leaves(trained))


def _make_model(config: VisualDecoderConfig) -> visual_decoder.VisualDecoder:
    return visual_decoder.VisualDecoder(config, rngs=nnx.Rngs(params=0))


def _shards(case: VisualCase) -> int:
    data, fsdp, _ = case.mesh_shape
    return data * fsdp * case.page.accumulate
