"""What the training stages share: a model made or resumed, an optimizer, the loop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.nn import decoder, param_trees
from rag_mm.nn.param_trees import Params
from rag_mm.perf import chips, flops
from rag_mm.train import loop, optimizer, throughput, train_step
from rag_mm.train import train_state as state


def check_config(
    optimizer_config: optimizer.OptimizerConfig, loop_config: loop.LoopConfig, batch_size: int
) -> None:
    """Refuses before a run is touched what would fail, or teach nothing, in the middle of it.

    Raises:
        ValueError: an unknown schedule, or a batch size or learning rate that is not positive.
    """
    optimizer.make_schedule(optimizer_config, loop_config.num_steps)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, give at least 1")
    if optimizer_config.learning_rate <= 0:
        raise ValueError(f"learning_rate is {optimizer_config.learning_rate}, give more than 0")


def make_mesh(
    num_rows: int, axes: tuple[int, int, int] = (1, 1, 1), is_explicit: bool = True
) -> Mesh:
    """The mesh that a stage trains on.

    Args:
        num_rows: of its batches.
        axes: `data`, `fsdp` and `tensor` of its config; for processes that have joined, be it one, `data` is
            as large as it takes to have all devices in the mesh.
        is_explicit: see `sharding.make_mesh`.

    Raises:
        UserError: there are fewer devices, or the batch does not split evenly over them.
    """
    data, fsdp, tensor = axes
    num_devices, rest = jax.device_count(), 0
    if jax.distributed.is_initialized():
        data, rest = divmod(num_devices, fsdp * tensor)
    if rest or data * fsdp * tensor > num_devices:
        raise UserError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not fit {num_devices} devices."
        )
    if num_rows % (data * fsdp):
        raise UserError(
            f"its batch of {num_rows} does not split over {data * fsdp} devices; give a batch_size "
            "that does, or fewer devices."
        )
    return sharding.make_mesh(data, fsdp, tensor, is_explicit)


def cost_of(model: nnx.Module, mesh: Mesh) -> throughput.Cost | None:
    """FLOPs of a step of a decoder, and the mesh's peak where its devices have a published one."""
    if not isinstance(model, decoder.Decoder):
        return None
    config = model.config

    def step_flops(batch: Mapping[str, Any]) -> float:
        rows, length = batch["tokens"].shape
        return rows * length * flops.train_flops(config, length)

    peak = chips.DEVICE_FLOPS.get(mesh.devices.flat[0].device_kind)
    return throughput.Cost(step_flops, None if peak is None else peak * mesh.size)


def train(
    name: str,
    stage_dir: epath.Path,
    make_model: Callable[[], nnx.Module],
    loss_fn: train_step.LossFn,
    batches: grain.DatasetIterator,
    *,
    optimizer_config: optimizer.OptimizerConfig,
    loop_config: loop.LoopConfig,
    seed: int,
    mesh: Mesh,
    prepare: Callable[[Params], Params] | None = None,
    derive: loop.Derive | None = None,
    watch: loop.Watch | None = None,
) -> tuple[Params, list[dict[str, float]]]:
    """Trains a model to its end, going on from where a killed run stood.

    Args:
        name: shown beside the progress bar.
        stage_dir: gets `checkpoints/` to resume from and `log.jsonl`.
        make_model: fresh model; called abstractly and once compiled.
        loss_fn: see `step.LossFn`.
        batches: from `data.pipeline`; of several processes each makes its `sharding.local_rows`.
        optimizer_config, loop_config: how to train.
        seed: of randomness inside the loss.
        mesh: where state and batches lie.
        derive: figures to log beside the averages they follow from.
        watch: figures to log at every checkpoint, measured on other data; may raise to end a broken run.
        prepare: changes fresh parameters before step 0 (such as a codebook from data).

    Returns:
        The trained parameters and the log's rows.
    """
    graphdef, _ = param_trees.describe(make_model, mesh)
    params = param_trees.init_params(make_model, mesh)
    if prepare is not None:
        params = prepare(params)
    guard = loop_config.guard
    tx = optimizer.make_optimizer(optimizer_config, loop_config.num_steps, guard)
    train_state = state.init_state(params, tx, mesh)
    step_fn = train_step.make_train_step(graphdef, loss_fn, tx, seed)
    extras = loop.Extras(cost=cost_of(nnx.eval_shape(make_model), mesh))
    if guard is not None:
        extras = dataclasses.replace(extras, max_skipped=guard.max_in_a_row)
    train_state, rows = loop.fit(
        name,
        train_state,
        step_fn,
        batches,
        mesh,
        stage_dir,
        loop_config,
        derive,
        watch,
        extras,
    )
    return train_state.params, rows
