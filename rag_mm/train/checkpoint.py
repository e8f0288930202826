"""Checkpoints of state and data iterator together; the one file that knows Orbax."""

from typing import Any

import grain
import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from rag_mm.core import progress
from rag_mm.core.errors import UserError
from rag_mm.nn.params import Params
from rag_mm.train.state import TrainState


class Checkpoints:
    """The checkpoints of one stage; a kill at any instant leaves the last whole one in force."""

    def __init__(self, directory: epath.PathLike, keep: int = 1, keep_every: int | None = None):
        """Keeps the `keep` newest, and for good those whose step is a multiple of `keep_every`."""
        policies = ocp.training.preservation_policies
        self._directory = epath.Path(directory)
        kept = [policies.LatestN(keep)]
        if keep_every is not None:
            kept.append(policies.EveryNSteps(keep_every))
        self._checkpointer = ocp.training.Checkpointer(
            _absolute(self._directory),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, or None."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, state: TrainState, iterator: grain.DatasetIterator) -> None:
        """Saves at `state.step`; returns when it is on disk."""
        step = int(state.step)
        if step == self.latest_step:
            return
        pieces = {"params": state.params, "optimizer": _optimizer(state), "data": iterator}
        self._checkpointer.save_checkpointables(step, pieces, force=True)

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
                (self._directory / str(damaged)).rename(self._directory / f"damaged-{damaged}")
            if step != max(steps):
                self._checkpointer.reload()
            return restored
        raise UserError(
            f"The newest checkpoint in {self._directory} does not fit this model and optimizer; "
            "it is another model's or damaged. Remove that folder to begin anew."
        ) from newest_error

    def _restore(self, step: int, state: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        abstract = jax.tree.map(_like, (state.params, _optimizer(state)))
        pieces = {"params": abstract[0], "optimizer": abstract[1], "data": iterator}
        loaded = self._checkpointer.load_checkpointables(step, pieces)
        optimizer = loaded["optimizer"]
        structure = jax.tree.structure(state.opt_state)
        opt_state = jax.tree.unflatten(structure, optimizer["leaves"])
        return TrainState(optimizer["step"], loaded["params"], opt_state)

    def close(self) -> None:
        """Waits for writes under way and frees threads."""
        self._checkpointer.close()


def save_params(directory: epath.PathLike, params: Params) -> None:
    """Writes parameters alone, whole or not at all; replaces what is there."""
    ocp.save(_absolute(directory), params, overwrite=True)


def load_params(directory: epath.PathLike, abstract: Params) -> Params:
    """Parameters that `save_params` wrote, in the shapes and layout of `abstract`.

    Raises:
        UserError: there are none, or they are another model's.
    """
    directory = epath.Path(directory)
    if not directory.exists():
        raise UserError(f"{directory} does not exist; train that stage first.")
    try:
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
