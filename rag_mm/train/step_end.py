"""A rule that changes parameters at the end of every training step, beside gradient descent.

Its state is part of the train state, so it is saved and restored, and a step stays a pure function of its
inputs.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import optax
from flax import nnx

from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import Params
from rag_mm.train.train_state import TrainState
from rag_mm.train.train_step import Metrics


class Update(Protocol):
    """(model after the step's updates, batch, the step's metrics, the rule's state) -> what it changes."""

    def __call__(
        self,
        model: nnx.Module,
        batch: Mapping[str, jax.Array],
        metrics: Metrics,
        own: Any,
        *,
        step: jax.Array,
        rng: jax.Array,
    ) -> tuple[Params, Any, Metrics]:
        """Returns the parameters that it changes, its next state, and metrics of its own.

        `step` counts the steps taken, this one included; `rng` is the one that the losses drew from.
        """


class StepEnd(NamedTuple):
    """The rule's state at step 0, and the rule."""

    init: Callable[[], Any]
    update: Update


class StateWithEnd(NamedTuple):
    """The optimizer's state, and that of the rule."""

    optimizer: optax.OptState
    end: Any


def extend_step(
    step_fn: Callable[..., tuple[TrainState, Metrics]],
    graphdef: nnx.GraphDef,
    end: StepEnd,
    seed: int,
) -> jax.stages.Wrapped:
    """`step_fn` followed by the rule, compiled as one step with donated state.

    Args:
        step_fn: (state, batch) or (state, batch, held=...) -> (state, metrics), of the same `seed`.
        graphdef: the model's structure.
        end: the rule.
        seed: of randomness.
    """

    def step(
        state: TrainState, batch: Mapping[str, jax.Array], **held: Params
    ) -> tuple[TrainState, Metrics]:
        plain = TrainState(state.step, state.params, state.opt_state.optimizer)
        after, metrics = step_fn(plain, batch, **held)
        model = nnx.merge(graphdef, param_trees.join(after.params, held.get("held", {})))
        changed, own, further = end.update(
            model,
            batch,
            metrics,
            state.opt_state.end,
            step=after.step,
            rng=jax.random.fold_in(jax.random.key(seed), state.step),
        )
        params = param_trees.join(after.params, changed)
        return (
            TrainState(after.step, params, StateWithEnd(after.opt_state, own)),
            metrics | further,
        )

    return jax.jit(step, donate_argnums=0)
