"""Training code that the training stages share: config checks, the mesh, and `train`."""

import dataclasses
from collections.abc import Callable

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
from rag_mm.train import loop, optimizer, throughput, train_state, train_step


def check_config(
    optimizer_config: optimizer.OptimizerConfig, loop_config: loop.LoopConfig, batch_size: int
) -> None:
    """Rejects settings that would fail, or train nothing, before a run is started.

    Raises:
        ValueError: the schedule is unknown, or the batch size or learning rate is not positive.
    """
    optimizer.make_schedule(optimizer_config, loop_config.num_steps)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")
    if optimizer_config.learning_rate <= 0:
        raise ValueError(f"learning_rate is {optimizer_config.learning_rate}; give more than 0")


def make_mesh(
    batch_size: int, axes: tuple[int, int, int] = (1, 1, 1), is_explicit: bool = True
) -> Mesh:
    """The mesh that a stage trains on.

    Args:
        batch_size: examples in a batch; must be a multiple of data * fsdp.
        axes: sizes of `data`, `fsdp` and `tensor` in the config. If processes have joined (even a single
            one), `data` is chosen so that the mesh covers all devices.
        is_explicit: see `sharding.make_mesh`.

    Raises:
        UserError: there are too few devices, or the batch does not split evenly over them.
    """
    data, fsdp, tensor = axes
    num_devices, rest = jax.device_count(), 0
    if jax.distributed.is_initialized():
        data, rest = divmod(num_devices, fsdp * tensor)
    if rest or data * fsdp * tensor > num_devices:
        raise UserError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not fit {num_devices} devices."
        )
    if batch_size % (data * fsdp):
        raise UserError(
            f"its batch of {batch_size} does not split over {data * fsdp} devices; give a batch_size "
            "that does, or fewer devices."
        )
    return sharding.make_mesh(data, fsdp, tensor, is_explicit)


def step_cost(model: nnx.Module, mesh: Mesh) -> throughput.Cost | None:
    """FLOPs of a training step, and the peak of the mesh if known; None for models other than decoders."""
    if not isinstance(model, decoder.Decoder):
        return None
    config = model.config
    peak = chips.DEVICE_FLOPS.get(mesh.devices.flat[0].device_kind)
    return throughput.Cost(
        lambda lengths: lengths * flops.train_flops(config, lengths),
        None if peak is None else peak * mesh.size,
    )


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
    """Trains a model to the last step, resuming from the latest checkpoint of an interrupted run.

    Args:
        name: label of the progress bar.
        stage_dir: receives `checkpoints/`, from which training resumes, and `log.jsonl`.
        make_model: makes an untrained model; called abstractly and once compiled.
        loss_fn: see `train_step.LossFn`.
        batches: from `data.pipeline`; with several processes, each makes its `sharding.local_rows`.
        optimizer_config: learning rate, schedule and moments.
        loop_config: number of steps, logging, checkpoints and guard.
        seed: of randomness inside the loss.
        mesh: devices of the state and the batches.
        prepare: changes the initial parameters before step 0, for instance to set a codebook from data.
        derive: metrics computed from the logged averages and logged with them.
        watch: metrics on other data, logged at every checkpoint; may raise to end a run early.

    Returns:
        The trained parameters, and the entries of the log.

    Raises:
        FloatingPointError: the loss is not finite, or the guard skipped too many updates in a row.
    """
    graphdef, _ = param_trees.describe(make_model, mesh)
    params = param_trees.init_params(make_model, mesh)
    if prepare is not None:
        params = prepare(params)
    guard = loop_config.guard
    tx = optimizer.make_optimizer(optimizer_config, loop_config.num_steps, guard)
    state = train_state.init_state(params, tx, mesh)
    step_fn = train_step.make_train_step(graphdef, loss_fn, tx, seed)
    extras = loop.Extras(cost=step_cost(nnx.eval_shape(make_model), mesh))
    if guard is not None:
        extras = dataclasses.replace(extras, max_skipped=guard.max_in_a_row)
    state, log = loop.fit(
        name,
        state,
        step_fn,
        batches,
        mesh,
        stage_dir,
        loop_config,
        derive,
        watch,
        extras,
    )
    return state.params, log
