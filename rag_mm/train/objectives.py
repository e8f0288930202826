"""Several losses in one step, each with the parameters that it trains and an optimizer of its own.

So a generator and a discriminator are trained: each loss is that of the whole model, and the parameters of
the other objectives are held while its gradient is taken.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import IsChosen, Params
from rag_mm.train import train_step as single
from rag_mm.train.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss, and the optimizer of the parameters that it trains.

    Attributes:
        loss_fn: see `train_step.LossFn`; it gets the whole model.
        optimizer: an Optax transformation of those parameters.
        trains: path -> whether it trains the parameter.
    """

    loss_fn: single.LossFn
    optimizer: optax.GradientTransformation
    trains: IsChosen


def init_state(params: Params, objectives: Mapping[str, Objective], mesh: Mesh) -> TrainState:
    """The state at step 0; raises as `init_optimizers` does."""
    with jax.set_mesh(mesh):
        opt_state = jax.jit(partial(init_optimizers, objectives=objectives))(params)
        return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def init_optimizers(
    params: Params, objectives: Mapping[str, Objective]
) -> dict[str, optax.OptState]:
    """The state of each objective's optimizer at step 0.

    Raises:
        ValueError: a parameter belongs to no objective or to several.
    """
    for path in param_trees.leaves_by_path(params):
        own = [name for name, each in objectives.items() if each.trains(path)]
        if len(own) != 1:
            raise ValueError(
                f"{path} is trained by {' and '.join(own) or 'no objective'}; give one"
            )
    return {
        name: each.optimizer.init(param_trees.split(params, each.trains)[0])
        for name, each in objectives.items()
    }


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    *,
    graphdef: nnx.GraphDef,
    objectives: Mapping[str, Objective],
    seed: int,
    num_parts: int = 1,
    held: Params | None = None,
    in_turn: bool = False,
) -> tuple[TrainState, single.Metrics]:
    """Takes one step of every objective; all draw the same random numbers.

    Args:
        state: from `init_state`.
        batch, graphdef, seed, num_parts, held: see `train_step.train_step`.
        objectives: by name, in the order in which they are taken.
        in_turn: whether an objective sees the parameters as the ones before it have just changed them;
            otherwise all gradients are taken at the same parameters.

    Returns:
        The next state and the metrics. Those of the first objective keep their names, the others' are
        NAME/METRIC.
    """
    params, opt_state = state.params, {}
    metrics: single.Metrics = {}
    fixed = dict(graphdef=graphdef, seed=seed, num_parts=num_parts)
    for name, each in objectives.items():
        own, others = param_trees.split(params if in_turn else state.params, each.trains)
        after, sums = single.train_step(
            TrainState(state.step, own, state.opt_state[name]),
            batch,
            loss_fn=each.loss_fn,
            optimizer=each.optimizer,
            held=param_trees.join(others, held or {}),
            **fixed,
        )
        params = param_trees.join(params, after.params)
        opt_state[name] = after.opt_state
        metrics |= {f"{name}/{key}" if metrics else key: sums[key] for key in sums}
    return TrainState(state.step + 1, params, opt_state), metrics


def make_train_step(
    graphdef: nnx.GraphDef,
    objectives: Mapping[str, Objective],
    seed: int,
    num_parts: int = 1,
    in_turn: bool = False,
) -> jax.stages.Wrapped:
    """`train_step` compiled, with donated state."""
    fixed = dict(graphdef=graphdef, objectives=objectives, seed=seed)
    bound = partial(train_step, **fixed, num_parts=num_parts, in_turn=in_turn)
    return jax.jit(bound, donate_argnums=0)
