"""Checkpoints of state and data iterator together; the one file that knows Orbax."""

from typing import Any

import grain
import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from rag_mm.core.errors import UserError
from rag_mm.nn.params import Params
from rag_mm.train.state import TrainState


class Checkpoints:
    """The checkpoints of one stage; a kill at any instant leaves the last whole one in force."""

    def __init__(self, directory: epath.PathLike, keep: int = 1):
        policies = ocp.training.preservation_policies
        self._directory = epath.Path(directory)
        self._checkpointer = ocp.training.Checkpointer(
            _absolute(self._directory),
            preservation_policy=policies.LatestN(keep),
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
        """The newest checkpoint in the layout of `state`; the iterator goes back to its place too.

        Raises:
            UserError: it is of another model or optimizer.
        """
        abstract = jax.tree.map(_like, (state.params, _optimizer(state)))
        pieces = {"params": abstract[0], "optimizer": abstract[1], "data": iterator}
        try:
            loaded = self._checkpointer.load_checkpointables(None, pieces)
        except (ValueError, KeyError) as error:  # Orbax names its own classes, not what differs.
            raise UserError(
                f"The newest checkpoint in {self._directory} does not fit this model and optimizer; "
                "it is another model's or damaged. Remove that folder to begin anew."
            ) from error
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
