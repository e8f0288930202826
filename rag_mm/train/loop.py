"""The training loop: resume, load a batch, step, log, save. It holds all state outside the training step."""

import collections
import contextlib
import contextvars
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from rag_mm.core import checks, costs, files, manifest_values, progress, sharding
from rag_mm.core.errors import UserError
from rag_mm.data import pipeline
from rag_mm.nn.param_trees import Params
from rag_mm.train import (
    checkpoint,
    preemption,
    throughput,
    tracking,
    train_metrics,
    update_guard,
    watchdog,
)
from rag_mm.train.train_state import TrainState
from rag_mm.train.train_step import Metrics

StepFn = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
# Averages of a log line -> further metrics computed from them, such as PSNR from the mean squared error.
Derive = Callable[[dict[str, np.ndarray]], dict[str, float]]
# (step, parameters) -> metrics on other data than the batches; may raise to end a broken run.
Watch = Callable[[int, Params], dict[str, float]]
# Two, so that an earlier checkpoint remains if the newest cannot be read.
KEEP_LAST = 2
# Sums since the last log line, for a run that was stopped between two log lines.
PARTIAL = "partial.json"
# Records of the batches whose skipped updates ended the run, by batch.
SKIPPED = "skipped.json"
# A process that waits longer for a batch or a step exits (see `watchdog`).
STALL_SECONDS = 900.0
# The error message lists at most this many records; the file has all.
_MAX_RECORDS_SHOWN = 20


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train, and how often to log and save; a checkpoint falls on a logged step.

    Attributes:
        num_steps: training steps.
        log_every: steps between lines of the log.
        checkpoint_every: steps between checkpoints; a multiple of `log_every`.
        guard: skips harmful updates, and ends the run after too many in a row; None skips none.
    """

    num_steps: int
    log_every: int = 20
    checkpoint_every: int = 200
    guard: update_guard.GuardConfig | None = dataclasses.field(
        default=None, metadata=manifest_values.ADDED_LATER
    )

    def __post_init__(self):
        checks.at_least(self, 1, "num_steps", "log_every", "checkpoint_every")
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every is {self.checkpoint_every}; give a multiple of "
                f"log_every={self.log_every}"
            )
        if self.guard is not None and not isinstance(self.guard, update_guard.GuardConfig):
            raise ValueError(
                f"guard is {self.guard!r}; give None or its settings, such as {{'window': 128}}"
            )


@dataclasses.dataclass(frozen=True)
class Extras:
    """Optional settings of `fit`.

    Attributes:
        max_skipped: this many consecutive updates skipped by the guard end the run.
        cost: FLOPs of a decoder's step, for MFU and tokens per second.
        result: state -> the parameters that `watch` measures.
    """

    max_skipped: int = update_guard.GuardConfig.max_in_a_row
    cost: throughput.Cost | None = None
    result: Callable[[TrainState], Params] = lambda state: state.params


_PROFILE: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "profile", default=None
)


@contextlib.contextmanager
def profiled(steps: tuple[int, int] | None) -> Iterator[None]:
    """Every `fit` in the body traces the steps from the first to the last of `steps`; None traces none."""
    token = _PROFILE.set(steps)
    try:
        yield
    finally:
        _PROFILE.reset(token)


def fit(
    name: str,
    state: TrainState,
    step_fn: StepFn,
    iterator: grain.DatasetIterator,
    mesh: Mesh,
    directory: epath.PathLike,
    config: LoopConfig,
    derive: Derive | None = None,
    watch: Watch | None = None,
    extras: Extras | None = None,
) -> tuple[TrainState, list[dict[str, float]]]:
    """Trains to `config.num_steps`, resuming from the newest checkpoint in `directory` if there is one.

    A run that is killed and restarted ends with bitwise the same state and log as an uninterrupted one: state
    and iterator are saved together, after the step and before the next batch is loaded, and averages are
    reset at every log line, with which every checkpoint coincides. On SIGTERM the current step is finished,
    then state and partial averages are saved and the process exits with code 143. Checkpoints are written
    while training continues.

    With several processes, each calls this with its own share of the same batches; files are written once.

    Speed is logged in `speed.jsonl` (`train.throughput`). Inside of `tracking.tracked` each log line also
    goes to an experiment tracker.

    Args:
        name: label in progress and error messages.
        state: the initial state; replaced by the newest checkpoint if there is one.
        step_fn: (state, batch) -> (state, metric sums); may donate the state.
        iterator: the batches; its position is saved with the state.
        mesh: the mesh of state and batches.
        directory: folder for checkpoints and logs.
        config: number of steps, and how often to log and save.
        derive: computes further metrics from the averages of a log line.
        watch: computes metrics on other data before each checkpoint; they are part of the same log line.
        extras: see `Extras`.

    Returns:
        The last state and the log lines.

    Raises:
        FloatingPointError: the loss is not finite, or too many updates in a row were skipped.
        UserError: a checkpoint cannot be written or read.
    """
    run = _Run(name, mesh, epath.Path(directory), config, derive, watch, extras or Extras())
    with contextlib.ExitStack() as stack:
        stop = preemption.Stop()
        stack.enter_context(preemption.listen(stop.request))
        agreement = preemption.Agreement(stop, mesh)
        checkpoints = checkpoint.Checkpoints(run.directory / checkpoint.FOLDER, KEEP_LAST)
        stack.callback(checkpoints.close)
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state, iterator)
        start = int(state.step)
        run.open(start)
        stack.callback(run.tracker.close)
        stack.enter_context(jax.set_mesh(mesh))
        bar = stack.enter_context(progress.track(name, config.num_steps, start))
        for step in range(start + 1, config.num_steps + 1):
            run.trace(step)
            batch = run.next_batch(iterator)
            state, sums = step_fn(state, batch)
            stop.reach(step)
            run.count(sums)
            is_last = step == config.num_steps
            if step % config.log_every == 0 or is_last:
                is_saved = step % config.checkpoint_every == 0 or is_last
                bar.update(step, **run.log_step(step, state, is_saved))
                if is_saved:
                    checkpoints.save(state, iterator, functools.partial(stop.commit, step))
                run.speed.restart()
            if agreement.is_due():
                run.save_partial(step)
                checkpoints.save(state, iterator)
                checkpoints.finish()
                raise SystemExit(preemption.EXIT_CODE)
        checkpoints.finish()
        run.finish()
        if agreement.is_requested():
            raise SystemExit(preemption.EXIT_CODE)
    return state, run.log.rows


class _Run:
    """The averages, logs, timer and trace of one call of `fit`."""

    def __init__(
        self,
        name: str,
        mesh: Mesh,
        directory: epath.Path,
        config: LoopConfig,
        derive: Derive | None,
        watch: Watch | None,
        extras: Extras,
    ):
        self.name, self.mesh, self.directory, self.config = name, mesh, directory, config
        self.derive, self.watch, self.extras = derive, watch, extras
        self._previous_sums: Metrics | None = None
        # As many batches as can be skipped before the next log line detects it.
        length = self.extras.max_skipped + config.log_every
        self._records: collections.deque[list[int]] = collections.deque(maxlen=length)
        self._is_traced = False

    def open(self, start: int) -> None:
        """Opens the logs and restores partial averages at step `start`."""
        self.averages = train_metrics.Averages()
        self.log = train_metrics.Log(self.directory / "log.jsonl", start)
        self.speed = throughput.Speed(
            self.directory / costs.SPEED_NAME,
            start,
            self.extras.cost,
            functools.partial(sharding.sum_rows, mesh=self.mesh),
        )
        self.board = train_metrics.Board(self.directory / costs.BOARD_NAME)
        self.tracker = tracking.Tracker(self.directory)
        partial = self.directory / PARTIAL
        if not partial.exists():
            return
        try:
            saved = files.read_object(partial, step=int, sums=dict)
            if saved["step"] == start:
                self.averages.from_json(saved["sums"])
        except (UserError, TypeError, ValueError) as error:
            progress.warn(
                f"{partial} is damaged ({error}): the next log line averages fewer steps."
            )
            self.averages = train_metrics.Averages()

    def next_batch(self, iterator: grain.DatasetIterator) -> dict:
        """The next batch on its devices; record numbers are removed and kept for error messages."""
        start = time.monotonic()
        with watchdog.within(STALL_SECONDS):
            host_batch = dict(next(iterator))
        records = np.asarray(host_batch.pop(pipeline.RECORDS, ()))
        if records.ndim > 1:  # One per token of packed rows.
            records = np.unique(records[records >= 0])
        self._records.append(records.tolist())
        batch = sharding.put_batch(host_batch, self.mesh)
        self.speed.load(host_batch, time.monotonic() - start)
        return batch

    def count(self, sums: Metrics) -> None:
        """Adds the step's sums and waits for the previous step, so that one step is in flight at a time."""
        self.averages.add(sums)
        if self._previous_sums is not None:
            with watchdog.within(STALL_SECONDS):
                jax.block_until_ready(self._previous_sums)
        self._previous_sums = sums
        self.speed.step()

    def log_step(self, step: int, state: TrainState, is_saved: bool) -> dict[str, float]:
        """Writes a log line. Returns the metrics to show in the progress bar."""
        values = self.averages.pop()
        num_skipped, num_in_a_row = update_guard.counts(state.opt_state)
        self._check(step, values, num_skipped, num_in_a_row)
        skipped = {"skipped": float(num_skipped)} if num_skipped else {}
        derived = self.derive(values) if self.derive is not None else {}
        speed = self.speed.write(step)
        watched = {}
        if self.watch is not None and is_saved:
            watched = self.watch(step, self.extras.result(state))
        figures: dict[str, Any] = {**values, **derived, **watched, **skipped}
        self.log.write(step, figures)
        scalars = train_metrics.scalars(train=figures, speed=speed)
        self.board.write(step, scalars)
        self.tracker.write(step, scalars)
        shown: dict[str, float] = {
            key: speed[key] for key in ("tokens_per_second", "mfu") if key in speed
        }
        return {"loss": float(values["loss"]), **watched, **skipped, **shown}

    def _check(self, step: int, values: dict, num_skipped: int, num_in_a_row: int) -> None:
        if num_in_a_row >= self.extras.max_skipped:
            raise FloatingPointError(
                f"{self.name}: {num_in_a_row} updates in a row were skipped, for batches "
                f"{step - num_in_a_row + 1} to {step}; their losses are non-finite or too high"
                + self._name_records(step, num_in_a_row)
            )
        for key in values:
            is_loss = key == "loss" or key.endswith("/loss")
            if is_loss and not np.isfinite(values[key]) and not num_skipped:
                raise FloatingPointError(f"{self.name}: the {key} at step {step} is not finite")

    def _name_records(self, step: int, num_batches: int) -> str:
        """Names the records of the last batches that this process loaded; writes all of them to a file."""
        loaded = list(self._records)[-num_batches:]
        by_batch = {str(step - len(loaded) + 1 + i): ids for i, ids in enumerate(loaded)}
        records = list(dict.fromkeys(record for ids in loaded for record in ids))
        if not records:
            return ""
        if jax.process_index() == 0:
            files.write_json(self.directory / SKIPPED, by_batch)
        shown = ", ".join(map(str, records[:_MAX_RECORDS_SHOWN]))
        num_more = len(records) - _MAX_RECORDS_SHOWN
        more = f" and {num_more} more" if num_more > 0 else ""
        return f" (records {shown}{more}; {self.directory / SKIPPED})"

    def trace(self, step: int) -> None:
        """Starts or ends the profile if this step is its first or follows its last."""
        first, last = _PROFILE.get() or (0, 0)
        if step == first:
            jax.profiler.start_trace(str(self.directory / costs.PROFILE_NAME))
            self._is_traced = True
        if step == last + 1:
            self._end_trace()

    def _end_trace(self) -> None:
        if self._is_traced:
            jax.block_until_ready(self._previous_sums)
            jax.profiler.stop_trace()
            self._is_traced = False

    def save_partial(self, step: int) -> None:
        sums = self.averages.to_json()
        if jax.process_index() == 0:
            files.write_json(self.directory / PARTIAL, {"step": step, "sums": sums})

    def finish(self) -> None:
        self._end_trace()
        self.board.close()
        if jax.process_index() == 0:
            for name in (PARTIAL, SKIPPED):
                (self.directory / name).unlink(missing_ok=True)
