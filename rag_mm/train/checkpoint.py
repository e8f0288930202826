"""Checkpoints of state and data iterator together; the one file that knows Orbax.

Written beside the training: `save` returns when the host has its own copy. What wall time was spent stands in
`times.json` (`core.clock`) and not here: two runs of the same bits have the same checkpoints.
"""

import asyncio
import errno
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grain
import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from rag_mm.core import progress
from rag_mm.core.errors import UserError
from rag_mm.nn.param_trees import Params
from rag_mm.train.train_state import TrainState


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log record tells what no exception of Orbax's does: those reach us, and are said once."""
    is_orbax = "orbax" in record.pathname
    return not is_orbax or (record.exc_info is None and record.levelno < logging.ERROR)


class Checkpoints:
    """The checkpoints of one stage; a kill at any instant leaves the last whole one in force."""

    def __init__(self, directory: epath.PathLike, keep: int = 1, keep_every: int | None = None):
        """Keeps the `keep` newest, and for good those whose step is a multiple of `keep_every`."""
        policies = ocp.training.preservation_policies
        self._directory = epath.Path(directory)
        logging.getLogger("absl").addFilter(_is_news)
        kept = [policies.LatestN(keep)]
        if keep_every is not None:
            kept.append(policies.EveryNSteps(keep_every))
        self._checkpointer = ocp.training.Checkpointer(
            _absolute(self._directory),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )
        self._saving: Any = None

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(
        self,
        state: TrainState,
        iterator: grain.DatasetIterator,
        on_commit: Callable[[], None] | None = None,
    ) -> None:
        """Begins to save at `state.step`; returns when nothing that is done to either can change it.

        One is written at a time: an earlier one is waited for. `on_commit` is called, from another thread, as
        soon as it is whole on disk.

        Raises:
            UserError: this one, or the one before, cannot be written; see `wait`.
        """
        step = int(state.step)
        self.wait()
        if step == self.latest_step:
            return
        pieces = {"params": state.params, "optimizer": _optimizer(state), "data": _Place(iterator)}
        try:
            saving = self._checkpointer.save_checkpointables_async(step, pieces, force=True)
        except Exception as error:
            self._refuse(error)
        self._saving = saving
        if saving is not None and on_commit is not None:
            saving.on_complete(lambda _: on_commit())

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            UserError: it could not be written, as when the disk is full; those before it stay.
        """
        saving, self._saving = self._saving, None
        try:
            self._checkpointer.wait()
            if saving is not None:
                saving.result()  # Nothing else ends the thread that wrote.
        except Exception as error:  # Whatever the thread that wrote has raised.
            self._refuse(error)

    def _refuse(self, error: Exception) -> NoReturn:
        """Says plainly what became of the newest checkpoint."""
        self._checkpointer.reload()
        is_full = "No space left" in str(error) or getattr(error, "errno", None) == errno.ENOSPC
        reason = "the disk is full" if is_full else f"{error}".strip().partition("\n")[0]
        last = self.latest_step
        kept = "there is none before it" if last is None else f"the one of step {last} is kept"
        raise UserError(
            f"A checkpoint cannot be written to {self._directory} ({reason}); {kept}. "
            f"{'Make room and run' if is_full else 'Run'} the same command again."
        ) from OSError(errno.ENOSPC if is_full else errno.EIO, str(error))

    def restore(self, state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """The newest checkpoint that can be read, in the layout of `state`, whatever mesh wrote it.

        The iterator goes back to its place too. One that cannot be read is put aside as `damaged-STEP`
        when one before it can.

        Raises:
            UserError: none is of this model and optimizer, or all are damaged.
        """
        steps = [found.step for found in self._checkpointer.checkpoints]
        newest_error: Exception | None = None
        for step in sorted(steps, reverse=True):
            try:
                restored = self._restore(step, state, iterator)
            except Exception as error:  # A damaged file makes Orbax raise whatever read it.
                newest_error = newest_error or error
                continue
            for damaged in (later for later in steps if later > step):
                progress.say(f"checkpoint {damaged} cannot be read; going on from {step}")
                self._put_aside(damaged)
            if step != max(steps):
                self._checkpointer.reload()
            return restored
        raise UserError(
            f"The newest checkpoint in {self._directory} does not fit this model and optimizer; "
            "it is another model's or damaged. Remove that folder to begin anew."
        ) from newest_error

    def _put_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            (self._directory / str(step)).rename(self._directory / f"damaged-{step}")
        multihost_utils.sync_global_devices(f"damaged {step}")

    def _restore(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        abstract = jax.tree.map(_like, (state.params, _optimizer(state)))
        pieces = {"params": abstract[0], "optimizer": abstract[1], "data": _Place(iterator)}
        loaded = self._checkpointer.load_checkpointables(step, pieces)
        optimizer = loaded["optimizer"]
        structure = jax.tree.structure(state.opt_state)
        opt_state = jax.tree.unflatten(structure, optimizer["leaves"])
        return TrainState(optimizer["step"], loaded["params"], opt_state)

    def close(self) -> None:
        """Waits for a write under way and frees threads; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()


class _Place:
    """An iterator's place in a checkpoint: one file, written once.

    Every process stands at the same batch, so any number of them can go on from what any other number
    wrote. The name is the one that Grain gives where there is one process.
    """

    _NAME = "process_0-of-1.json"

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterator = iterator

    async def save(self, directory: Any) -> Awaitable[None]:
        """What the background does: the state of now, into a folder that is yet to be made."""
        text = json.dumps(self._iterator.get_state(), indent=4)

        async def write() -> None:
            folder = await directory.await_creation()
            if jax.process_index() == 0:
                await asyncio.to_thread((folder / self._NAME).write_text, text)

        return write()

    async def load(self, directory: epath.Path) -> Awaitable[None]:
        """What the background does: takes the iterator there."""

        async def read() -> None:
            text = await asyncio.to_thread((directory / self._NAME).read_text)
            self._iterator.set_state(json.loads(text))

        return read()


def save_params(directory: epath.PathLike, params: Params) -> None:
    """Writes parameters alone, whole or not at all; replaces what is there. All processes call it."""
    ocp.save(_absolute(directory), params, overwrite=True)


def load_params(directory: epath.PathLike, abstract: Params) -> Params:
    """Parameters that `save_params` wrote, in the shapes and layout of `abstract`.

    Each of several processes loads for itself, whether others do or not: `abstract` lies on its own devices.

    Raises:
        UserError: there are none, or they are another model's.
    """
    directory = epath.Path(directory)
    if not directory.exists():
        raise UserError(f"{directory} does not exist; train that stage first.")
    own, context = jax.process_index(), ocp.Context()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = own, {own}
    try:
        with context:
            return ocp.load(_absolute(directory), abstract)
    except (ValueError, KeyError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{directory} does not hold this model's parameters ({reason}).") from error


def _absolute(directory: epath.PathLike) -> epath.Path:
    # Orbax takes no relative path.
    return epath.Path(directory).resolve()


def _optimizer(state: TrainState) -> dict[str, Any]:
    # Optax states are tuples of named tuples; a flat list keeps the file independent of their classes.
    return {"step": state.step, "leaves": jax.tree.leaves(state.opt_state)}


def _like(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
