"""AdamW with gradient clipping and a learning-rate schedule, from Optax."""

import dataclasses

import jax
import optax

from rag_mm.core import checks
from rag_mm.train import update_guard


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping and a schedule; defaults are RA-CM3's where the paper gives them.

    Attributes:
        learning_rate: peak learning rate.
        warmup_steps: steps of linear warm-up from zero.
        schedule: linear | cosine | wsd, to zero at the last step; or constant.
        b1: decay rate of the first moment.
        b2: decay rate of the second moment.
        weight_decay: decoupled weight decay (AdamW), times the learning rate.
        clip_norm: largest global norm of a gradient; larger gradients are scaled down to it.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 1500
    schedule: str = "linear"
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self):
        checks.above(self, 0, "learning_rate", "clip_norm")
        checks.at_least(self, 0, "warmup_steps", "weight_decay")
        checks.below_one(self, "b1", "b2")


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from zero, then the chosen decay.

    `wsd` is warmup-stable-decay (MiniCPM, Hu et al. 2024): constant, then linear to zero over the last
    30 % of the steps.

    Raises:
        ValueError: the schedule is not one of linear, cosine, wsd, constant.
    """
    peak, warmup = config.learning_rate, min(config.warmup_steps, num_steps)
    after = max(num_steps - warmup, 1)
    stable = max(warmup, round(0.7 * num_steps))
    decays = {
        "linear": lambda: optax.linear_schedule(peak, 0.0, after),
        "cosine": lambda: optax.cosine_decay_schedule(peak, after),
        "wsd": lambda: optax.linear_schedule(peak, 0.0, num_steps - stable, stable - warmup),
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

    Norm scales, biases and temperatures are not decayed.
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
    return chained if guard is None else update_guard.guard(chained, guard)


def _is_decayed(params: optax.Params) -> optax.Params:

    def decide(path: tuple, _: jax.Array) -> bool:
        return str(path[-1].key) not in ("scale", "bias", "q_smear", "k_smear", "logit_scale")

    return jax.tree_util.tree_map_with_path(decide, params)
