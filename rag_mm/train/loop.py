"""The loop around the step: resume, draw, step, log, save. Everything stateful stands here in plain sight."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from rag_mm.core import progress, sharding
from rag_mm.nn.params import Params
from rag_mm.train import checkpoint, metrics
from rag_mm.train.state import TrainState
from rag_mm.train.step import Metrics

StepFn = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
# Figures that follow from a log's averages, such as decibels from a mean squared error.
Derive = Callable[[dict[str, np.ndarray]], dict[str, float]]
# (step, parameters) -> figures on other data than the batches; may raise to end a broken run.
Watch = Callable[[int, Params], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Config:
    """How long, and how often to look; a checkpoint falls on a logged step and is watched over."""

    num_steps: int
    log_every: int = 20
    checkpoint_every: int = 200

    def __post_init__(self):
        least = min(self.num_steps, self.log_every, self.checkpoint_every)
        if least < 1 or self.checkpoint_every % self.log_every:
            raise ValueError(
                "num_steps is at least 1 and checkpoint_every a multiple of log_every, not "
                f"{self.num_steps}, {self.checkpoint_every} and {self.log_every}"
            )


def fit(
    name: str,
    state: TrainState,
    step_fn: StepFn,
    iterator: grain.DatasetIterator,
    mesh: Mesh,
    directory: epath.PathLike,
    config: Config,
    derive: Derive | None = None,
    watch: Watch | None = None,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Trains to `config.num_steps`, from the newest checkpoint in `directory` if there is one.

    Killed and run again it gives the same state and log, to the bit, as if it had never stopped: state
    and iterator are saved together, after the step and before the next batch is drawn, and averages are
    closed at every log, on which every checkpoint falls.

    Where a checkpoint falls, `watch` is asked first and its figures stand in the same row of the log.

    Returns:
        The last state and the log's rows.
    """
    directory = epath.Path(directory)
    averages = metrics.Averages()
    with contextlib.ExitStack() as stack:
        checkpoints = checkpoint.Checkpoints(directory / "checkpoints")
        stack.callback(checkpoints.close)
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state, iterator)
        start = int(state.step)
        log = metrics.Log(directory / "log.jsonl", start)
        stack.enter_context(jax.set_mesh(mesh))
        bar = stack.enter_context(progress.track(name, config.num_steps, start))
        for step in range(start + 1, config.num_steps + 1):
            batch = sharding.put_batch(next(iterator), mesh)
            state, sums = step_fn(state, batch)
            averages.add(sums)
            is_last = step == config.num_steps
            if step % config.log_every == 0 or is_last:
                values = averages.pop()
                if not np.isfinite(values["loss"]):
                    raise FloatingPointError(f"{name}: the loss at step {step} is not finite")
                derived = derive(values) if derive is not None else {}
                is_saved = step % config.checkpoint_every == 0 or is_last
                seen = watch(step, state.params) if watch is not None and is_saved else {}
                log.write(step, {**values, **derived, **seen})
                bar.update(step, loss=float(values["loss"]), **seen)
                if is_saved:
                    checkpoints.save(state, iterator)
    return state, log.rows
