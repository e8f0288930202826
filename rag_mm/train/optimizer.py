"""AdamW with clipping, a schedule, groups of parameters and moving averages, from Optax."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rag_mm.core import checks, manifest_values
from rag_mm.core.errors import UserError
from rag_mm.models.clip import MAX_LOGIT_SCALE
from rag_mm.nn import param_trees
from rag_mm.nn.param_trees import Params
from rag_mm.train import update_guard

# Largest values of parameters, by name.
MAX_VALUES = {"logit_scale": math.log(MAX_LOGIT_SCALE)}


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Parameters with settings of their own; a setting that is None is the optimizer's.

    Attributes:
        name: of the group.
        params: patterns of the parameters' paths, such as `embedding/*`; see `param_trees.matching`.
        learning_rate, warmup_steps, schedule, weight_decay, end_rate, ema: see `OptimizerConfig`.
    """

    name: str
    params: tuple[str, ...]
    learning_rate: float | None = None
    warmup_steps: int | None = None
    schedule: str | None = None
    weight_decay: float | None = None
    end_rate: float | None = None
    ema: float | None = None


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
        ema: decay per step of a moving average of the parameters, which becomes the result of the training;
            None: the last parameters are the result.
        groups: groups of parameters with settings of their own, such as ({"name": "codes", "params":
            ("embedding/*",), "learning_rate": 1e-5},); see `GroupConfig`.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 1500
    schedule: str = "linear"
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    end_rate: float = dataclasses.field(default=0.0, metadata=manifest_values.ADDED_LATER)
    ema: float | None = dataclasses.field(default=None, metadata=manifest_values.ADDED_LATER)
    groups: tuple[Mapping[str, Any], ...] = dataclasses.field(
        default=(), metadata=manifest_values.ADDED_LATER
    )

    def __post_init__(self):
        checks.above(self, 0, "learning_rate", "clip_norm")
        checks.at_least(self, 0, "warmup_steps", "weight_decay")
        checks.below_one(self, "b1", "b2")
        checks.between(self, 0, 1, "end_rate")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}; give at least 0 and below 1, such as 0.999")
        by_group = self.by_group()
        if len(by_group) <= len(self.groups):
            raise ValueError("two groups have one name, or one is called ''; give each a name")
        for config in by_group.values():
            make_schedule(config, 1)

    def patterns(self) -> dict[str, tuple[str, ...]]:
        """The patterns of each group's parameters, by name."""
        return {group.name: group.params for group in self._groups()}

    def by_group(self) -> "dict[str, OptimizerConfig]":
        """The settings of each group, by name, and under "" those of the other parameters."""
        configs = {"": dataclasses.replace(self, groups=())} if self.groups else {"": self}
        for group in self._groups():
            own = {k: v for k, v in vars(group).items() if k not in ("name", "params")}
            given = {key: value for key, value in own.items() if value is not None}
            configs[group.name] = dataclasses.replace(configs[""], **given)
        return configs

    def _groups(self) -> list[GroupConfig]:
        if not self.groups:
            return []
        # Imported here because benchmarks run where config pages cannot be read.
        from rag_mm.core import configuration

        return [configuration.make(GroupConfig, group, "groups") for group in self.groups]


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
    """Clipping, then AdamW with the schedule, by group; with `guard`, bad updates are skipped.

    Gradients are clipped by the norm over all groups. Norm scales, biases and temperatures are not decayed.
    No update leaves a parameter above its `MAX_VALUES`, wherever it was before.

    Its `init` raises UserError if a group's pattern matches no parameter, or two groups have one in common.
    """
    by_group = config.by_group()
    adam = {name: _adam(each, num_steps) for name, each in by_group.items()}
    label = partial(_label, config.patterns())
    chained = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.partition(adam, label) if config.groups else adam[""],
    )
    made = optax.GradientTransformation(chained.init, partial(_bounded_update, chained.update))
    decays = {name: each.ema for name, each in by_group.items() if each.ema is not None}
    if decays:
        made = optax.chain(made, _moving_average(decays, label))
    return made if guard is None else update_guard.guard(made, guard)


def _adam(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    return optax.adamw(
        make_schedule(config, num_steps),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=_is_decayed,
    )


def _label(patterns: Mapping[str, tuple[str, ...]], params: Params) -> Any:
    """The name of the group of each parameter, "" for those of no group."""
    owners = {
        name: param_trees.matching(each, params, f"the group {name}")
        for name, each in patterns.items()
    }
    labels = []
    for path in param_trees.leaves_by_path(params):
        own = [name for name, is_own in owners.items() if is_own(path)]
        if len(own) > 1:
            raise UserError(f"{path} is in the groups {' and '.join(own)}; put it in one of them.")
        labels.append(own[0] if own else "")
    return jax.tree.unflatten(jax.tree.structure(params), labels)


class MovingAverage(NamedTuple):
    """Averages of the parameters that have one."""

    average: Params


def averages(opt_state: optax.OptState) -> Params:
    """The moving averages in an optimizer's state, of those parameters that have one."""
    is_average = lambda node: isinstance(node, MovingAverage)
    found: Params = {}
    for node in jax.tree.leaves(opt_state, is_leaf=is_average):
        if is_average(node):
            found = param_trees.join(found, node.average)
    return found


def _moving_average(decays: Mapping[str, float], label: Any) -> optax.GradientTransformation:
    """Keeps decay * average + (1 - decay) * parameters of the groups in `decays`; changes no update."""

    def choose(params: Params, tree: Params) -> Params:
        names = param_trees.leaves_by_path(label(params))
        return param_trees.split(tree, lambda path: names[path] in decays)[0]

    def init(params: Params) -> MovingAverage:
        # A copy: the same buffer could not be donated twice.
        return MovingAverage(jax.tree.map(jnp.copy, choose(params, params)))

    def update(
        updates: Params, state: MovingAverage, params: Params
    ) -> tuple[Params, MovingAverage]:
        new = optax.apply_updates(choose(params, params), choose(params, updates))
        rates = choose(params, jax.tree.map(lambda name: 1 - decays.get(name, 0.0), label(params)))
        move = lambda average, value, rate: average + rate * (value - average)
        return updates, MovingAverage(jax.tree.map(move, state.average, new, rates))

    return optax.GradientTransformation(init, update)


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
