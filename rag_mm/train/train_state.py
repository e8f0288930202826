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
    """What a step changes.

    Attributes:
        step: number of steps taken, int32 [].
        params: the trained parameters, float32, as nested dicts.
        opt_state: the optimizer's state; with several objectives the state of each one's optimizer by name.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState


def init_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state at step 0; each optimizer moment has the sharding of its parameter."""
    with jax.set_mesh(mesh):
        opt_state = jax.jit(optimizer.init)(params)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state)
