"""The loop around the step: resume, draw, step, log, save. Everything stateful stands here in plain sight."""

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

from rag_mm.core import costs, files, progress, sharding
from rag_mm.data import pipeline
from rag_mm.nn.param_trees import Params
from rag_mm.train import checkpoint, preemption, throughput, train_metrics, update_guard, watchdog
from rag_mm.train.train_state import TrainState
from rag_mm.train.train_step import Metrics

StepFn = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
# Figures that follow from a log's averages, such as decibels from a mean squared error.
Derive = Callable[[dict[str, np.ndarray]], dict[str, float]]
# (step, parameters) -> figures on other data than the batches; may raise to end a broken run.
Watch = Callable[[int, Params], dict[str, float]]
# A checkpoint that cannot be read must have one before it.
KEEP_LAST = 2
# Sums since the last log, where a run was told to end between two logs.
PARTIAL = "partial.json"
# The records of batches whose updates were skipped until the run gave up, by batch.
SKIPPED = "skipped.json"
# A message names at most so many records; the file has all.
_NUM_NAMED = 20


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long, and how often to look; a checkpoint falls on a logged step and is watched over.

    `guard` leaves out updates that would harm, and says how many in a row end the run; None leaves out none.
    """

    num_steps: int
    log_every: int = 20
    checkpoint_every: int = 200
    guard: update_guard.GuardConfig | None = None

    def __post_init__(self):
        least = min(self.num_steps, self.log_every, self.checkpoint_every)
        if least < 1 or self.checkpoint_every % self.log_every:
            raise ValueError(
                "num_steps is at least 1 and checkpoint_every a multiple of log_every, not "
                f"{self.num_steps}, {self.checkpoint_every} and {self.log_every}"
            )
        if self.guard is not None and not isinstance(self.guard, update_guard.GuardConfig):
            raise ValueError(
                f"guard is {self.guard!r}, give None or its settings, such as {{'window': 128}}"
            )


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a long run wants besides.

    Attributes:
        keep_every: checkpoints at multiples of it stay for good.
        max_skipped: so many updates in a row that the optimizer's guard left out end the run.
        cost: FLOPs of a step, for MFU.
        profile: first and last step of a trace for TensorBoard, written to `profile/`; None: `profiled`'s.
        stall_seconds: a process that waits longer for a batch, or for a step on it, is ended (`watchdog`).
    """

    keep_every: int | None = None
    max_skipped: int = update_guard.GuardConfig.max_in_a_row
    cost: throughput.Cost | None = None
    profile: tuple[int, int] | None = None
    stall_seconds: float = 900.0


_PROFILE: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "profile", default=None
)


@contextlib.contextmanager
def profiled(steps: tuple[int, int] | None) -> Iterator[None]:
    """Every `fit` of the body traces these steps, the first and the last; None traces none."""
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
    """Trains to `config.num_steps`, from the newest checkpoint in `directory` if there is one.

    Killed and run again it gives the same state and log, to the bit, as if it had never stopped: state
    and iterator are saved together, after the step and before the next batch is drawn, and averages are
    closed at every log, on which every checkpoint falls. SIGTERM saves after the step under way, averages
    so far included, and ends the process with exit code 143. Checkpoints are written while training goes on.

    Several processes call this alike, each with its own rows of the same batches; files are written once.

    Where a checkpoint falls, `watch` is asked first and its figures stand in the same row of the log. How
    fast it went stands in `speed.jsonl` (`train.speed`).

    Returns:
        The last state and the log's rows.

    Raises:
        FloatingPointError: the loss is no number, or too many updates in a row were skipped.
        UserError: a checkpoint cannot be written or read.
    """
    run = _Run(name, mesh, epath.Path(directory), config, derive, watch, extras or Extras())
    with contextlib.ExitStack() as stack:
        stop = preemption.Stop()
        stack.enter_context(preemption.listen(stop.ask))
        agreement = preemption.Agreement(stop, mesh)
        checkpoints = checkpoint.Checkpoints(
            run.directory / "checkpoints", KEEP_LAST, run.extras.keep_every
        )
        stack.callback(checkpoints.close)
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(state, iterator)
        start = int(state.step)
        run.open(start)
        stack.enter_context(jax.set_mesh(mesh))
        bar = stack.enter_context(progress.track(name, config.num_steps, start))
        for step in range(start + 1, config.num_steps + 1):
            run.trace(step)
            batch = run.draw(iterator)
            state, sums = step_fn(state, batch)
            stop.reach(step)
            run.count(batch, sums)
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
                checkpoints.close()
                raise SystemExit(preemption.EXIT_CODE)
        checkpoints.wait()
        run.finish()
        if agreement.is_asked():
            raise SystemExit(preemption.EXIT_CODE)
    return state, run.log.rows


class _Run:
    """One run's averages, log and stop watch."""

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
        self._before: Metrics | None = None
        # As many as may be skipped until the next log notices.
        length = self.extras.max_skipped + config.log_every
        self._records: collections.deque[list[int]] = collections.deque(maxlen=length)
        self._is_traced = False

    def open(self, start: int) -> None:
        """Takes up log and averages at step `start`."""
        self.averages = train_metrics.Averages()
        self.log = train_metrics.Log(self.directory / "log.jsonl", start)
        self.speed = throughput.Speed(self.directory / costs.SPEED_NAME, start, self.extras.cost)
        self.board = train_metrics.Board(self.directory / costs.BOARD_NAME)
        partial = self.directory / PARTIAL
        if partial.exists() and (kept := files.read_json(partial))["step"] == start:
            self.averages.from_json(kept["sums"])

    def draw(self, iterator: grain.DatasetIterator) -> dict:
        """The next batch on its devices, without the records' numbers, which are kept for a message."""
        began = time.monotonic()
        with watchdog.within(self.extras.stall_seconds):
            rows = dict(next(iterator))
        self._records.append(np.asarray(rows.pop(pipeline.RECORDS, ())).tolist())
        batch = sharding.put_batch(rows, self.mesh)
        self.speed.wait(time.monotonic() - began)
        return batch

    def count(self, batch: dict, sums: Metrics) -> None:
        """Adds up, and lets one step be under way while the host goes on: a time is then a step's own."""
        self.averages.add(sums)
        if self._before is not None:
            with watchdog.within(self.extras.stall_seconds):
                jax.block_until_ready(self._before)
        self._before = sums
        self.speed.step(batch)

    def log_step(self, step: int, state: TrainState, is_saved: bool) -> dict[str, float]:
        """Writes a row of the log; what is worth showing."""
        values = self.averages.pop()
        num_skipped, num_in_a_row = update_guard.counts(state.opt_state)
        self._check(step, values, num_skipped, num_in_a_row)
        skipped = {"skipped": float(num_skipped)} if num_skipped else {}
        derived = self.derive(values) if self.derive is not None else {}
        fast = self.speed.write(step)
        seen = self.watch(step, state.params) if self.watch is not None and is_saved else {}
        figures: dict[str, Any] = {**values, **derived, **seen, **skipped}
        self.log.write(step, figures)
        self.board.write(step, train=figures, speed=fast)
        shown: dict[str, float] = {
            key: fast[key] for key in ("tokens_per_second", "mfu") if key in fast
        }
        return {"loss": float(values["loss"]), **seen, **skipped, **shown}

    def _check(self, step: int, values: dict, num_skipped: int, num_in_a_row: int) -> None:
        if num_in_a_row >= self.extras.max_skipped:
            raise FloatingPointError(
                f"{self.name}: {num_in_a_row} updates in a row were skipped, those of batches "
                f"{step - num_in_a_row + 1} to {step}; their losses are no numbers or too high"
                + self._name_records(step, num_in_a_row)
            )
        if not np.isfinite(values["loss"]) and not num_skipped:
            raise FloatingPointError(f"{self.name}: the loss at step {step} is not finite")

    def _name_records(self, step: int, num_batches: int) -> str:
        """Of the last batches as far as this process drew them; all of them stand in a file."""
        drawn = list(self._records)[-num_batches:]
        by_batch = {str(step - len(drawn) + 1 + i): ids for i, ids in enumerate(drawn)}
        found = list(dict.fromkeys(record for ids in drawn for record in ids))
        if not found:
            return ""
        if jax.process_index() == 0:
            files.write_json(self.directory / SKIPPED, by_batch)
        more = f" and {len(found) - _NUM_NAMED} more" if len(found) > _NUM_NAMED else ""
        return f" (records {', '.join(map(str, found[:_NUM_NAMED]))}{more}; {self.directory / SKIPPED})"

    def trace(self, step: int) -> None:
        """Starts and ends the profile where it falls on this step."""
        first, last = self.extras.profile or _PROFILE.get() or (0, 0)
        if step == first:
            jax.profiler.start_trace(str(self.directory / costs.PROFILE_NAME))
            self._is_traced = True
        if step == last + 1:
            self._end_trace()

    def _end_trace(self) -> None:
        if self._is_traced:
            jax.block_until_ready(self._before)
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
