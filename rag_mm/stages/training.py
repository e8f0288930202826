"""Training code that the training stages share: config checks, the mesh, and `train`."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import grain
import jax
import jax.numpy as jnp
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.nn import decoder, param_trees
from rag_mm.nn.param_trees import IsChosen, Params
from rag_mm.perf import chips, flops
from rag_mm.train import (
    loop,
    objectives,
    optimizer,
    step_end,
    throughput,
    train_state,
    train_step,
    update_guard,
)


@dataclasses.dataclass(frozen=True)
class FurtherLoss:
    """A loss beside a stage's first one, such as a discriminator's.

    Attributes:
        loss_fn: see `train_step.LossFn`.
        optimizer_config: of its parameters, or an Optax transformation that updates them.
        trains: path -> whether it trains the parameter; the first loss trains all others.
    """

    loss_fn: train_step.LossFn
    optimizer_config: optimizer.OptimizerConfig | optax.GradientTransformation
    trains: IsChosen


@dataclasses.dataclass(frozen=True)
class WhatTrains:
    """Which parameters a stage trains and by which losses; the defaults are all of them by one.

    Attributes:
        is_frozen: path -> whether the parameter is left as it is.
        frozen_dtype: dtype in which frozen parameters are kept; None: as they are.
        further_losses: by name, which prefixes their metrics.
        in_turn: whether a further loss sees the parameters as the losses before it have just changed them.
        step_end: a rule that changes parameters after the losses have, such as a restart of dead codes.
    """

    is_frozen: IsChosen = lambda path: False
    frozen_dtype: str | None = None
    further_losses: Mapping[str, FurtherLoss] = dataclasses.field(default_factory=dict)
    in_turn: bool = False
    step_end: "step_end.StepEnd | None" = None


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


def make_mesh(batch_size: int, axes: tuple[int, int, int] = (1, 1, 1), num_parts: int = 1) -> Mesh:
    """The mesh that a stage trains on.

    Args:
        batch_size: examples in a batch; must be a multiple of data * fsdp * num_parts.
        axes: sizes of `data`, `fsdp` and `tensor` in the config. If processes have joined (even a single
            one), `data` is chosen so that the mesh covers all devices.
        num_parts: parts that a step's batch is processed in, one after the other.

    Raises:
        UserError: there are too few devices, or the batch does not split evenly over them and into parts.
    """
    data, fsdp, tensor = axes
    num_devices, rest = jax.device_count(), 0
    if jax.distributed.is_initialized():
        data, rest = divmod(num_devices, fsdp * tensor)
    if rest or data * fsdp * tensor > num_devices:
        raise UserError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} does not fit {num_devices} devices."
        )
    if batch_size % (data * fsdp * num_parts):
        parts = f" in {num_parts} parts" if num_parts > 1 else ""
        raise UserError(
            f"its batch of {batch_size} does not split over {data * fsdp} devices{parts}; give a batch_size "
            f"that does, or fewer {'parts or ' if parts else ''}devices."
        )
    return sharding.make_mesh(data, fsdp, tensor)


def step_cost(model: nnx.Module, mesh: Mesh, is_all_trained: bool = True) -> throughput.Cost | None:
    """FLOPs of a training step, and the peak of the mesh if known; None for models other than decoders.

    Without a gradient for all parameters the FLOPs are fewer, so that no MFU is told.
    """
    if not isinstance(model, decoder.Decoder):
        return None
    config = model.config
    peak = chips.DEVICE_FLOPS.get(mesh.devices.flat[0].device_kind)
    return throughput.Cost(
        lambda lengths: lengths * flops.train_flops(config, lengths),
        None if peak is None or not is_all_trained else peak * mesh.size,
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
    num_parts: int = 1,
    start: Callable[[Params], Params] | None = None,
    prepare: Callable[[Params], Params] | None = None,
    what: WhatTrains = WhatTrains(),
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
        optimizer_config: learning rate, schedule, moments, groups and moving averages.
        loop_config: number of steps, logging, checkpoints and guard.
        seed: of randomness inside the loss.
        mesh: devices of the state and the batches.
        num_parts: gradient accumulation, see `train_step.train_step`.
        start: abstract parameters -> those that are not initialized, such as another stage's.
        prepare: changes the initial parameters before step 0, for instance to set a codebook from data.
        what: which parameters are trained and by which losses.
        derive: metrics computed from the logged averages and logged with them.
        watch: metrics on other data, logged at every checkpoint; may raise to end a run early.

    Returns:
        All parameters, frozen ones too and moving averages where there are any, and the entries of the log.

    Raises:
        FloatingPointError: the loss is not finite, or the guard skipped too many updates in a row.
        UserError: every parameter is frozen, a group has no parameter or shares one, or a parameter does not
            split over the mesh.
        RuntimeError: a frozen parameter changed.
    """
    graphdef, abstract = param_trees.describe(make_model, mesh)
    param_trees.check_split(abstract, f"{name}: give another scale.mesh")
    given = None if start is None else start(abstract)
    params = param_trees.init_params(make_model, mesh, given)
    if prepare is not None:
        params = prepare(params)
    frozen, trained = param_trees.split(params, what.is_frozen)
    if not trained:
        raise UserError(f"{name}: every parameter is frozen; leave some to train.")
    if what.frozen_dtype is not None:
        frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(what.frozen_dtype)), frozen)
    del given, params
    before = param_trees.bit_sums(frozen)
    init, step_fn = make_step(
        graphdef, loss_fn, what, optimizer_config, loop_config, seed, num_parts
    )
    with jax.set_mesh(mesh):
        state = train_state.TrainState(jnp.zeros((), jnp.int32), trained, jax.jit(init)(trained))

    def result(state: train_state.TrainState) -> Params:
        averaged = param_trees.join(state.params, optimizer.averages(state.opt_state))
        return param_trees.join(averaged, frozen)

    extras = loop.Extras(
        cost=step_cost(nnx.eval_shape(make_model), mesh, not frozen), result=result
    )
    if loop_config.guard is not None:
        extras = dataclasses.replace(extras, max_skipped=loop_config.guard.max_in_a_row)
    state, log = loop.fit(
        name,
        state,
        partial(step_fn, held=frozen) if frozen else step_fn,
        batches,
        mesh,
        stage_dir,
        loop_config,
        derive,
        watch,
        extras,
    )
    changed = [path for path, sums in param_trees.bit_sums(frozen).items() if sums != before[path]]
    if changed:
        raise RuntimeError(f"{name}: the frozen parameter {changed[0]} changed while training")
    return result(state), log


def make_step(
    graphdef: nnx.GraphDef,
    loss_fn: train_step.LossFn,
    what: WhatTrains,
    optimizer_config: optimizer.OptimizerConfig,
    loop_config: loop.LoopConfig,
    seed: int,
    num_parts: int,
) -> tuple[Callable[[Params], optax.OptState], jax.stages.Wrapped]:
    """The optimizer's state at step 0 as a function of the trained parameters, and the compiled step.

    Args:
        graphdef: the model's structure.
        loss_fn, what, optimizer_config, loop_config, seed, num_parts: see `train`.
    """

    def make(
        given: optimizer.OptimizerConfig | optax.GradientTransformation,
    ) -> optax.GradientTransformation:
        if isinstance(given, optimizer.OptimizerConfig):
            return optimizer.make_optimizer(given, loop_config.num_steps, loop_config.guard)
        return given if loop_config.guard is None else update_guard.guard(given, loop_config.guard)

    tx, further = make(optimizer_config), what.further_losses
    init, end = tx.init, what.step_end
    if further:
        is_left = lambda path: not any(each.trains(path) for each in further.values())
        by_name = {"": objectives.Objective(loss_fn, tx, is_left)} | {
            name: objectives.Objective(each.loss_fn, make(each.optimizer_config), each.trains)
            for name, each in further.items()
        }
        init = partial(objectives.init_optimizers, objectives=by_name)
        step_fn = objectives.make_train_step(graphdef, by_name, seed, num_parts, what.in_turn)
    else:
        step_fn = train_step.make_train_step(graphdef, loss_fn, tx, seed, num_parts)
    if end is None:
        return init, step_fn
    return (
        lambda params: step_end.StateWithEnd(init(params), end.init()),
        step_end.extend_step(step_fn, graphdef, end, seed),
    )
