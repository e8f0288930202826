"""The stage's training step, and encoding by its model, as programs to compile for a TPU topology.

Nothing is read but the config: neither images nor a language model need be there.
"""

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
from rag_mm.nn import param_trees
from rag_mm.perf import chips
from rag_mm.perf.plan import programs, traffic
from rag_mm.stages import training
from rag_mm.stages.shared import world_config
from rag_mm.stages.spae import added_losses, rank_words, train_autoencoder
from rag_mm.train.train_state import TrainState

NAME = "spae"
REMATS = ("none", "full")
# Full remat makes four forward passes of three.
_MODEL_SHARE = {"none": 1.0, "full": 0.75}


@dataclasses.dataclass(frozen=True)
class _AnyImages(world_config.EmojiWorld):
    """Images of a size, which nobody reads."""

    size: int = 0

    @property
    def image_size(self) -> int:
        return self.size


@dataclasses.dataclass(frozen=True)
class TokenizerCase:
    """What is planned.

    Attributes:
        config: the stage's; `batch_size` and `scale` are those of the plan.
        pools: settings of the stage word_pools, for their widths.
        is_encoding: encoding of a batch in place of the training step.
    """

    config: train_autoencoder.SPAEStageConfig
    pools: rank_words.WordPoolsStageConfig
    is_encoding: bool = False


def make_case(
    page: Mapping[str, Any],
    topology: chips.Topology,
    *,
    batch_size: int | None = None,
    num_parts: int | None = None,
    remat: str | None = None,
    mesh: tuple[int, int, int] | None = None,
    is_encoding: bool = False,
) -> TokenizerCase:
    """The stage of a chain's page on a topology; None means the page's value.

    Args:
        page: a chain's config with defaults, as plain values.
        topology: the target.
        batch_size: images per step.
        num_parts: parts of a step's batch.
        remat: none | full.
        mesh: data, fsdp, tensor; None: all chips along data, as no parameter is split.
        is_encoding: plans encoding instead.

    Raises:
        UserError: a value is invalid, or the batch does not split.
    """
    values = page[NAME]
    world = _AnyImages(size=values["model"]["image_size"])
    config = configuration.make(
        train_autoencoder.SPAEStageConfig, {"seed": 0, "world": world, **values}, NAME
    )
    if config.losses.needs_retriever:
        raise UserError(
            f"To plan the perceptual loss, name its tower by --config.{NAME}.losses.folder."
        )
    try:
        scale = dataclasses.replace(
            config.scale,
            mesh=mesh or (topology.num_chips, 1, 1),
            num_parts=1 if is_encoding else num_parts or config.scale.num_parts,
            remat=remat or config.scale.remat,
        )
    except ValueError as error:
        raise UserError(f"{NAME}.scale: {error}.") from None
    changed = dataclasses.replace(config, batch_size=batch_size or config.batch_size, scale=scale)
    shards = scale.mesh[0] * scale.mesh[1] * scale.num_parts
    if changed.batch_size % shards:
        raise UserError(
            f"A batch of {changed.batch_size} images does not split over data x fsdp x parts = {shards}; "
            f"use a multiple of {shards}."
        )
    pools = configuration.make(
        rank_words.WordPoolsStageConfig,
        {"seed": 0, "world": world, **page.get("word_pools", {})},
        "word_pools",
    )
    return TokenizerCase(changed, pools, is_encoding)


def make_program(case: TokenizerCase, topology: chips.Topology) -> programs.Program:
    """The case as a program to compile; its FLOPs and memory traffic are the compiler's counts."""
    config = case.config
    scale, num_params = config.scale, _count_params(config)

    def costs(compiled: programs.Compiled) -> programs.Costs | None:
        if compiled.flops is None or compiled.moved_bytes is None:
            return None
        each = compiled.flops * topology.num_chips / config.batch_size
        share, dcn = _MODEL_SHARE[scale.remat], 0.0
        if case.is_encoding:
            share = 1.0
        else:
            dcn = traffic.gradient_bytes(num_params, scale.mesh, topology.num_slices)
        return programs.Costs(
            "image",
            config.batch_size,
            share * each,
            each,
            compiled.moved_bytes,
            dcn * scale.num_parts,
        )

    return programs.Program(
        partial(_lower_encoding if case.is_encoding else _lower_training, case),
        scale.mesh,
        costs,
        {
            "num_params": num_params,
            "program": "encode" if case.is_encoding else "train",
            "batch_size": config.batch_size,
            "num_parts": scale.num_parts,
            "remat": scale.remat,
            "dtype": scale.dtype,
            "image_size": config.model.image_size,
            "codes_per_image": config.model.num_codes,
        },
    )


def vary(
    case: TokenizerCase, topology: chips.Topology, remat: str, num_parts: int
) -> programs.Program:
    """The program with other remat and parts."""
    scale = dataclasses.replace(case.config.scale, remat=remat, num_parts=num_parts)
    config = dataclasses.replace(case.config, scale=scale)
    return make_program(dataclasses.replace(case, config=config), topology)


def _lower_training(case: TokenizerCase, mesh: Mesh) -> jax.stages.Lowered:
    config = case.config
    make_model, loss_fn, what = train_autoencoder.step_parts(config, None)
    graphdef, params = param_trees.describe(make_model, mesh)
    frozen, trained = param_trees.split(params, what.is_frozen)
    num_parts = config.scale.num_parts
    init, step_fn = training.make_step(
        graphdef, loss_fn, what, config.optimizer, config.loop, config.seed, num_parts
    )
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(lambda p: TrainState(jnp.int32(0), p, init(p)), trained)
        held = {"held": frozen} if frozen else {}
        return step_fn.lower(state, _batch(case, mesh), **held)


def _lower_encoding(case: TokenizerCase, mesh: Mesh) -> jax.stages.Lowered:
    make_model, *_ = train_autoencoder.step_parts(
        dataclasses.replace(case.config, losses=added_losses.AddedLossesConfig()),
        None,
    )
    graphdef, params = param_trees.describe(make_model, mesh)
    batch = _batch(case, mesh)
    shape = batch["images"].shape
    images = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch["images"].sharding)

    @jax.jit
    def encode(params: param_trees.Params, *inputs: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params).encode(*inputs)

    embeddings = [batch["embeddings"]] if case.config.model.guide_dim else []
    with jax.set_mesh(mesh):
        return encode.lower(params, images, *embeddings)


def _batch(case: TokenizerCase, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    config, pools = case.config, case.pools
    size, rows = config.model.image_size, config.batch_size
    layout = NamedSharding(mesh, PartitionSpec(sharding.ACTIVATION_AXES["batch"]))
    spec = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=layout)
    batch = {"images": spec(jnp.uint8, size, size, 3)}
    if config.uses_pools:
        batch["embeddings"] = spec(jnp.float32, max(config.model.guide_dim, 1))
        batch["pool_words"] = spec(jnp.int32, pools.max_words)
        batch["pool_sizes"] = spec(jnp.int32, len(pools.thresholds))
    return batch


def _count_params(config: train_autoencoder.SPAEStageConfig) -> int:
    """Parameters of everything that the step reads, by abstract evaluation."""
    make_model, *_ = train_autoencoder.step_parts(config, None)
    _, abstract = param_trees.describe(make_model, None)
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))
