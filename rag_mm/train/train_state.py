"""The state that a training step updates."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rag_mm.nn.param_trees import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Number of steps taken (int32 []), float32 parameters as nested dicts, and the optimizer state."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState


def init_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state at step 0; each optimizer moment has the sharding of its parameter."""
    with jax.set_mesh(mesh):
        opt_state = jax.jit(optimizer.init)(params)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state)
