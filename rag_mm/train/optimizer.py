"""AdamW with gradient clipping and a learning-rate schedule, from Optax."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import optax

from rag_mm.core import checks, manifest_values
from rag_mm.models.clip import MAX_LOGIT_SCALE
from rag_mm.train import update_guard

# Largest values of parameters, by name.
MAX_VALUES = {"logit_scale": math.log(MAX_LOGIT_SCALE)}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping and a schedule; defaults are RA-CM3's where the paper gives them.

    Attributes:
        learning_rate: peak learning rate.
        warmup_steps: steps of linear warm-up from zero.
        schedule: linear | cosine | wsd, falling to `end_rate` at the last step; or constant.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        weight_decay: decoupled weight decay (AdamW), times the learning rate.
        clip_norm: largest global norm of a gradient; larger gradients are scaled down to it.
        end_rate: learning rate at the last step, as a fraction of the peak; unused by `constant`.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 1500
    schedule: str = "linear"
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    end_rate: float = dataclasses.field(default=0.0, metadata=manifest_values.ADDED_LATER)

    def __post_init__(self):
        checks.above(self, 0, "learning_rate", "clip_norm")
        checks.at_least(self, 0, "warmup_steps", "weight_decay")
        checks.below_one(self, "b1", "b2")
        checks.between(self, 0, 1, "end_rate")


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from zero, then the chosen decay.

    `wsd` is warmup-stable-decay (MiniCPM, Hu et al. 2024): constant, then linear over the last 30 % of the
    steps.

    Raises:
        ValueError: the schedule is not one of linear, cosine, wsd, constant.
    """
    peak, warmup = config.learning_rate, min(config.warmup_steps, num_steps)
    end = peak * config.end_rate
    after = max(num_steps - warmup, 1)
    stable = max(warmup, round(0.7 * num_steps))
    decays = {
        "linear": lambda: optax.linear_schedule(peak, end, after),
        "cosine": lambda: optax.cosine_decay_schedule(peak, after, config.end_rate),
        "wsd": lambda: optax.linear_schedule(peak, end, num_steps - stable, stable - warmup),
        "constant": lambda: optax.constant_schedule(peak),
    }
    if config.schedule not in decays:
        raise ValueError(f"schedule is one of {', '.join(decays)}, not {config.schedule!r}")
    ramp = optax.linear_schedule(0.0, peak, max(warmup, 1))
    return optax.join_schedules([ramp, decays[config.schedule]()], [warmup])


def make_optimizer(
    config: OptimizerConfig, num_steps: int, guard: update_guard.GuardConfig | None = None
) -> optax.GradientTransformation:
    """Clipping, then AdamW with the schedule; with `guard`, bad updates are skipped.

    Norm scales, biases and temperatures are not decayed. No update leaves a parameter above its `MAX_VALUES`,
    wherever it was before.
    """
    chained = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, num_steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=_is_decayed,
        ),
    )
    bounded = optax.GradientTransformation(chained.init, partial(_bounded_update, chained.update))
    return bounded if guard is None else update_guard.guard(bounded, guard)


def _bounded_update(
    update: optax.TransformUpdateFn,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
) -> tuple[optax.Updates, optax.OptState]:
    """`update`, limited so that the sum of parameter and update is at most its `MAX_VALUES`.

    The loss reads the parameter as it is: at the bound a gradient that points down still has its effect.
    """
    updates, state = update(grads, state, params)

    def limit(path: tuple, change: jax.Array, param: jax.Array) -> jax.Array:
        largest = MAX_VALUES.get(path[-1].key)
        return change if largest is None else jnp.minimum(change, largest - param)

    return jax.tree_util.tree_map_with_path(limit, updates, params), state


def _is_decayed(params: optax.Params) -> optax.Params:

    def decide(path: tuple, _: jax.Array) -> bool:
        return str(path[-1].key) not in ("scale", "bias", "q_smear", "k_smear", "logit_scale")

    return jax.tree_util.tree_map_with_path(decide, params)
