"""Checkpoints of training state and data iterator together; the only file that uses Orbax.

Saving is asynchronous: `save` returns once the host has its own copy. A list of checksums is added when a
checkpoint is complete (`core.checksums`), and compared before it is restored. Wall time is recorded in
`times.json` (`core.costs`) and not in checkpoints, so that bitwise identical runs have identical checkpoints.
"""

import asyncio
import contextlib
import errno
import glob
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from concurrent import futures
from typing import Any, NoReturn

import grain
import jax
import numpy as np
from etils import epath
from etils.epath import gpath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from rag_mm.core import checksums, files, processes, progress, remote
from rag_mm.core.errors import UserError
from rag_mm.nn.param_trees import Params, leaves_by_path
from rag_mm.train.train_state import TrainState

# A stage's folder of checkpoints: one folder per step, and `damaged-STEP` for those that were put aside.
FOLDER = "checkpoints"
_DAMAGED, _DELETED = "damaged-", ".deleted-"

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

    def __init__(self, directory: epath.PathLike, keep: int = 1):
        """Keeps the newest `keep` checkpoints."""
        self._directory = epath.Path(directory)
        logging.getLogger("absl").addFilter(_is_not_reported)
        self._checkpointer = ocp.training.Checkpointer(
            _absolute(self._directory),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: futures.Future[None] | None = None

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
        another thread as soon as the checkpoint and its checksums are complete on disk.

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
        self._saving = self._thread.submit(self._complete, saving, step, on_commit)

    def _complete(self, saving: Any, step: int, on_commit: Callable[[], None] | None) -> None:
        """Waits until Orbax has written a checkpoint, in all processes, and adds its checksums."""
        saving.result()
        if jax.process_index() == 0:
            checksums.write(self._directory / str(step))
        if on_commit is not None:
            on_commit()

    def wait(self) -> None:
        """Waits until no checkpoint is being written.

        Raises:
            UserError: the checkpoint could not be written, such as on a full disk; earlier ones are kept.
        """
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
            self._checkpointer.wait()
        except Exception as error:  # The writer thread can raise any type.
            self._raise_user_error(error)

    def _raise_user_error(self, error: Exception) -> NoReturn:
        """Raises a UserError that says why writing failed and which checkpoint remains."""
        with contextlib.suppress(Exception):  # Orbax may report the same failure once more.
            self._checkpointer.wait()
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
        """Loads the newest sound checkpoint, in the layout of `state`, whatever mesh wrote it.

        The state of `iterator` is restored too. Newer checkpoints, which differ from their checksums or
        cannot be read, are renamed to `damaged-STEP`. One without checksums, of an older version or of a
        process that was killed before it wrote them, is restored with a warning.

        Raises:
            UserError: no checkpoint fits this model and optimizer, or all are damaged.
        """
        steps = [metadata.step for metadata in self._checkpointer.checkpoints]
        errors: dict[int, Exception] = {}
        for step in sorted(steps, reverse=True):
            try:
                self._check(step)
                restored = self._restore(step, state, iterator)
            except Exception as error:  # With a damaged file Orbax can raise any type.
                errors[step] = error
                continue
            for damaged, cause in errors.items():
                found = f"{cause}".rstrip(".") if isinstance(cause, UserError) else "unreadable"
                progress.say(f"checkpoint {damaged} is damaged ({found}); resuming from {step}")
                self._put_aside(damaged)
            if errors:
                self._checkpointer.reload()
            return restored
        raise UserError(
            f"The newest checkpoint in {self._directory} does not fit this model and optimizer; "
            "it is damaged or belongs to another model. Remove that folder to start over."
        ) from next(iter(errors.values()))

    def _check(self, step: int) -> None:
        """Compares a checkpoint with its checksums, each process a part of it; all see the same result.

        Raises:
            UserError: it is damaged.
        """
        folder, error = self._directory / str(step), None
        if not checksums.exists(folder):
            progress.say(f"checkpoint {step} has no checksums, so it is restored unchecked")
            return
        try:
            checksums.check(folder, jax.process_index(), jax.process_count())
        except UserError as own_error:
            error = own_error
        if jax.process_count() > 1:
            found = multihost_utils.process_allgather(np.asarray([error is not None]))
            if error is None and np.any(found):
                error = UserError(f"{folder} differs from its checksums.")
        if error is not None:
            raise error

    def _put_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            target = self._directory / f"{_DAMAGED}{step}"
            if target.exists():  # It was damaged before and saved again.
                files.discard(target)
            (self._directory / str(step)).rename(target)
        multihost_utils.sync_global_devices(f"damaged {step}")

    def _restore(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        abstract = jax.tree.map(_abstract, (state.params, _optimizer(state)))
        pieces = {"params": abstract[0], "optimizer": abstract[1], "data": _IteratorState(iterator)}
        loaded = self._checkpointer.load_checkpointables(step, pieces)
        optimizer = loaded["optimizer"]
        structure = jax.tree.structure(state.opt_state)
        opt_state = jax.tree.unflatten(structure, optimizer["leaves"])
        return TrainState(optimizer["step"], loaded["params"], opt_state)

    def finish(self) -> None:
        """Waits in every process until the last checkpoint and its list are written; raises as `wait`."""
        self.wait()
        processes.broadcast_from_leader()

    def close(self) -> None:
        """Waits for a checkpoint being written and frees threads; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
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


def keep_last(directory: epath.PathLike) -> None:
    """Deletes all in a folder of checkpoints but the newest one; does nothing if there is no such folder.

    For the end of a stage: what is left then does not depend on where training was interrupted, or which
    checkpoint was damaged. One process calls it.
    """
    directory = epath.Path(directory)
    if not directory.exists():
        return
    entries = {entry.name: entry for entry in directory.iterdir()}
    last = max((name for name in entries if name.isdigit()), key=int, default=None)
    for name, entry in entries.items():
        if name == last:
            continue
        if name.isdigit():
            # Renamed first, so that a kill never leaves half a checkpoint under its name.
            entry = entry.rename(directory / f"{_DELETED}{name}")
        files.discard(entry)


def save_params(directory: epath.PathLike, params: Params) -> None:
    """Writes parameters atomically, replacing any existing ones. Every process calls it."""
    logging.getLogger("absl").addFilter(_is_not_reported)
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


def param_shapes(directory: epath.PathLike) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that `save_params` wrote, by path, without reading them.

    Raises:
        UserError: there are no parameters in `directory`.
    """
    try:
        tree = ocp.metadata(_absolute(directory)).metadata
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"{directory} does not hold a model's parameters ({error}).") from error
    return {path: tuple(leaf.shape) for path, leaf in leaves_by_path(tree).items()}


def _absolute(directory: epath.PathLike) -> epath.Path:
    # Orbax does not accept relative paths. Of a URL, `resolve` would make a local one.
    directory = epath.Path(directory)
    return directory if remote.is_remote(directory) else directory.resolve()


def _optimizer(state: TrainState) -> dict[str, Any]:
    # Optax states are nested named tuples; a flat list makes the checkpoint independent of their classes.
    return {"step": state.step, "leaves": jax.tree.leaves(state.opt_state)}


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
