"""Checkpoints of training state and data iterator together; the only file that uses Orbax.

Saving is asynchronous: `save` returns once the host has its own copy. Wall time is recorded in `times.json`
(`core.costs`) and not in checkpoints, so that bitwise identical runs have identical checkpoints.
"""

import asyncio
import errno
import glob
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NoReturn

import grain
import jax
from etils import epath
from etils.epath import gpath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from rag_mm.core import progress
from rag_mm.core.errors import UserError
from rag_mm.nn.param_trees import Params
from rag_mm.train.train_state import TrainState

_glob = gpath.PosixGPath.glob


def _glob_below(folder: gpath.PosixGPath, pattern: str) -> Iterator[gpath.PosixGPath]:
    return _glob(type(folder)(glob.escape(str(folder))), pattern)


# etils takes brackets, `*` and `?` in the folder's own name for a pattern, so that Orbax would miss the parts
# of a checkpoint in a folder `[0:3]`, or find those of another.
gpath.PosixGPath.glob = _glob_below


def _is_not_reported(record: logging.LogRecord) -> bool:
    """Whether a log record is not an Orbax error, which is also raised as an exception and reported once."""
    is_orbax = "orbax" in record.pathname
    return not is_orbax or (record.exc_info is None and record.levelno < logging.ERROR)


class Checkpoints:
    """The checkpoints of one stage; after a kill at any time the last complete one is used."""

    def __init__(self, directory: epath.PathLike, keep: int = 1, keep_every: int | None = None):
        """Keeps the newest `keep` checkpoints, and for good those at multiples of `keep_every` steps."""
        policies = ocp.training.preservation_policies
        self._directory = epath.Path(directory)
        logging.getLogger("absl").addFilter(_is_not_reported)
        preserved = [policies.LatestN(keep)]
        if keep_every is not None:
            preserved.append(policies.EveryNSteps(keep_every))
        self._checkpointer = ocp.training.Checkpointer(
            _absolute(self._directory),
            preservation_policy=policies.AnyPreservationPolicy(preserved),
            cleanup_tmp_directories=True,
        )
        self._saving: Any = None

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(
        self,
        state: TrainState,
        iterator: grain.DatasetIterator,
        on_commit: Callable[[], None] | None = None,
    ) -> None:
        """Starts saving at `state.step`; returns once changes to state and iterator can no longer affect it.

        Only one checkpoint is written at a time: a previous one is waited for. `on_commit` is called from
        another thread as soon as the checkpoint is complete on disk.

        Raises:
            UserError: this checkpoint or the previous one cannot be written; see `wait`.
        """
        step = int(state.step)
        self.wait()
        if step == self.latest_step:
            return
        pieces = {
            "params": state.params,
            "optimizer": _optimizer(state),
            "data": _IteratorState(iterator),
        }
        try:
            saving = self._checkpointer.save_checkpointables_async(step, pieces, force=True)
        except Exception as error:
            self._raise_user_error(error)
        self._saving = saving
        if saving is not None and on_commit is not None:
            saving.on_complete(lambda _: on_commit())

    def wait(self) -> None:
        """Waits until no checkpoint is being written.

        Raises:
            UserError: the checkpoint could not be written, such as on a full disk; earlier ones are kept.
        """
        saving, self._saving = self._saving, None
        try:
            self._checkpointer.wait()
            if saving is not None:
                saving.result()  # Only this ends the writer thread.
        except Exception as error:  # The writer thread can raise any type.
            self._raise_user_error(error)

    def _raise_user_error(self, error: Exception) -> NoReturn:
        """Raises a UserError that says why writing failed and which checkpoint remains."""
        self._checkpointer.reload()
        is_full = "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
        reason = "the disk is full" if is_full else f"{error}".strip().partition("\n")[0]
        last = self.latest_step
        kept = "there is no earlier one" if last is None else f"the one of step {last} is kept"
        raise UserError(
            f"A checkpoint cannot be written to {self._directory} ({reason}); {kept}. "
            f"{'Free disk space and run' if is_full else 'Run'} the same command again."
        ) from OSError(errno.ENOSPC if is_full else errno.EIO, str(error))

    def restore(self, state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """Loads the newest readable checkpoint, in the layout of `state`, whatever mesh wrote it.

        The state of `iterator` is restored too. Unreadable checkpoints newer than the one loaded are renamed
        to `damaged-STEP`.

        Raises:
            UserError: no checkpoint fits this model and optimizer, or all are damaged.
        """
        steps = [metadata.step for metadata in self._checkpointer.checkpoints]
        newest_error: Exception | None = None
        for step in sorted(steps, reverse=True):
            try:
                restored = self._restore(step, state, iterator)
            except Exception as error:  # With a damaged file Orbax can raise any type.
                newest_error = newest_error or error
                continue
            for damaged in (later for later in steps if later > step):
                progress.say(f"checkpoint {damaged} cannot be read; resuming from {step}")
                self._rename_damaged(damaged)
            if step != max(steps):
                self._checkpointer.reload()
            return restored
        raise UserError(
            f"The newest checkpoint in {self._directory} does not fit this model and optimizer; "
            "it is damaged or belongs to another model. Remove that folder to start over."
        ) from newest_error

    def _rename_damaged(self, step: int) -> None:
        if jax.process_index() == 0:
            (self._directory / str(step)).rename(self._directory / f"damaged-{step}")
        multihost_utils.sync_global_devices(f"damaged {step}")

    def _restore(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        abstract = jax.tree.map(_abstract, (state.params, _optimizer(state)))
        pieces = {"params": abstract[0], "optimizer": abstract[1], "data": _IteratorState(iterator)}
        loaded = self._checkpointer.load_checkpointables(step, pieces)
        optimizer = loaded["optimizer"]
        structure = jax.tree.structure(state.opt_state)
        opt_state = jax.tree.unflatten(structure, optimizer["leaves"])
        return TrainState(optimizer["step"], loaded["params"], opt_state)

    def close(self) -> None:
        """Waits for a checkpoint being written and frees threads; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()


class _IteratorState:
    """The state of a data iterator in a checkpoint: one file, written by process 0.

    All processes are at the same batch, so a run can resume with another number of processes. The file
    name is the one that Grain uses for a single process.
    """

    _NAME = "process_0-of-1.json"

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterator = iterator

    async def save(self, directory: Any) -> Awaitable[None]:
        """Called by Orbax: writes the state as of this call, once the checkpoint's folder exists."""
        text = json.dumps(self._iterator.get_state(), indent=4)

        async def write() -> None:
            folder = await directory.await_creation()
            if jax.process_index() == 0:
                await asyncio.to_thread((folder / self._NAME).write_text, text)

        return write()

    async def load(self, directory: epath.Path) -> Awaitable[None]:
        """Called by Orbax: restores the iterator's state."""

        async def read() -> None:
            text = await asyncio.to_thread((directory / self._NAME).read_text)
            self._iterator.set_state(json.loads(text))

        return read()


def save_params(directory: epath.PathLike, params: Params) -> None:
    """Writes parameters atomically, replacing any existing ones. Every process calls it."""
    ocp.save(_absolute(directory), params, overwrite=True)


def load_params(directory: epath.PathLike, abstract: Params) -> Params:
    """Loads parameters that `save_params` wrote, in the shapes and layout of `abstract`.

    A process may call it independently of the others; `abstract` must use its own devices only.

    Raises:
        UserError: there are no parameters in `directory`, or they belong to another model.
    """
    directory = epath.Path(directory)
    if not directory.exists():
        raise UserError(f"{directory} does not exist; train that stage first.")
    process, context = jax.process_index(), ocp.Context()
    context.multiprocessing.primary_host = process
    context.multiprocessing.active_processes = {process}
    try:
        with context:
            return ocp.load(_absolute(directory), abstract)
    except (ValueError, KeyError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory} does not hold this model's parameters ({reason}).") from error


def _absolute(directory: epath.PathLike) -> epath.Path:
    # Orbax does not accept relative paths.
    return epath.Path(directory).resolve()


def _optimizer(state: TrainState) -> dict[str, Any]:
    # Optax states are nested named tuples; a flat list makes the checkpoint independent of their classes.
    return {"step": state.step, "leaves": jax.tree.leaves(state.opt_state)}


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
