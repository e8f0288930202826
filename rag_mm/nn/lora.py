"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen model whose linear maps get trained updates of low rank.

A map with the kernel W of [in, out] becomes x W + (alpha / rank) x A B (Hu et al. 2021, section 4.1), with A
of [in, rank] and B of [rank, out]. B starts at zero, so that training starts at the model as it was.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from rag_mm.core import checks, manifest_values, sharding
from rag_mm.core.errors import UserError
from rag_mm.nn import layers, param_trees
from rag_mm.nn.param_trees import Params
from rag_mm.ops import projection

Model = TypeVar("Model", bound=nnx.Module)
Result = TypeVar("Result")
A, B = "lora_a", "lora_b"  # names of the parameters, next to `kernel`
_KEY = "dropout_key"
_STREAM = 0x10A  # Of the random keys of dropout, beside those of a loss.


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Sizes of the updates, and the maps that get one; the default targets are those of the paper's models.

    Attributes:
        rank: columns of A and rows of B.
        alpha: the update is scaled by alpha / rank.
        targets: names of linear maps, such as q, k, v, out, gate, up and down; also patterns of paths, such
            as `attention/*` or `cross_attention/*`. A bare name is in both attentions.
        dropout: probability with which an input of an update is 0 in training, the others scaled up.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = dataclasses.field(default=0.0, metadata=manifest_values.ADDED_LATER)

    def __post_init__(self):
        checks.at_least(self, 1, "rank")
        checks.above(self, 0, "alpha")
        checks.at_least(self, 0, "dropout")
        checks.below_one(self, "dropout")
        if not self.targets:
            raise ValueError("targets is empty; name linear maps, such as ('q', 'v')")

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / self.rank


class DropoutKey(nnx.Variable):
    """The random key of an update's dropout; in a stack, one for each layer."""


class LoRALinear(layers.Linear):
    """A `Linear` plus scale x A B; in a stack, A and B have its leading axis of layers too.

    Inputs of the update are dropped where there is a `DropoutKey`, which `start_dropout` puts in.
    """

    def __init__(self, linear: layers.Linear, config: LoRAConfig, *, rngs: nnx.Rngs):
        """Takes over the kernel and the bias of `linear`."""
        self.num_in, self.scale, self.dropout = linear.num_in, config.scale, config.dropout
        self.kernel, self.bias = linear.kernel, linear.bias
        shape, axes = self.kernel.shape, self.kernel.axes
        stacked, each = shape[: len(shape) - len(axes)], shape[len(shape) - len(axes) :]
        into, out = each[: self.num_in], each[self.num_in :]
        std = math.prod(into) ** -0.5
        self.lora_a = layers.make_param(
            rngs, (*stacked, *into, config.rank), (*axes[: self.num_in], None), std
        )
        zeros = jnp.zeros((*stacked, config.rank, *out), jnp.float32)
        self.lora_b = nnx.Param(zeros, axes=(None, *axes[self.num_in :]))

    def __call__(self, x: Float[Array, "B T *in"]) -> Float[Array, "B T *out"]:
        """Returns x's dtype."""
        key = getattr(self, _KEY, None)
        kept = x if key is None else _drop(x, key[...], self.dropout)
        low = projection.project(kept, self.lora_a[...], self.lora_a.axes, self.num_in)
        update = projection.project(low, self.lora_b[...], self.lora_b.axes, 1)
        return super().__call__(x) + self.scale * update


def add(model: Model, config: LoRAConfig, *, rngs: nnx.Rngs) -> Model:
    """The model itself, with updates added to its linear maps; all other parameters stay as they are.

    Raises:
        UserError: a target names no linear map of the model.
    """
    found = {
        "/".join(map(str, (*path, name))): (parent, name)
        for path, parent in nnx.iter_modules(model)
        for name, child in vars(parent).items()
        if type(child) is layers.Linear
    }
    chosen = set()
    for target in config.targets:
        matches = [path for path in found if fnmatch.fnmatchcase(f"/{path}", f"*/{target}")]
        if not matches:
            names = ", ".join(sorted({path.rpartition("/")[2] for path in found}))
            raise UserError(f"lora.targets has {target!r}; the model's linear maps are {names}.")
        chosen.update(matches)
    for path in sorted(chosen):
        parent, name = found[path]
        setattr(parent, name, LoRALinear(getattr(parent, name), config, rngs=rngs))
    return model


def with_dropout(loss_fn: Callable[..., Result]) -> Callable[..., Result]:
    """A loss of (model, batch, rng) in which the model's updates, if it has any, drop inputs."""

    def dropping(model: nnx.Module, batch: Any, rng: Key[Array, ""]) -> Result:
        return loss_fn(start_dropout(model, jax.random.fold_in(rng, _STREAM)), batch, rng)

    return dropping


def start_dropout(model: Model, rng: Key[Array, ""]) -> Model:
    """The model itself, whose updates drop inputs from now on, each by a key of its own."""
    updates = [child for _, child in nnx.iter_modules(model) if isinstance(child, LoRALinear)]
    for number, update in enumerate(updates):
        if update.dropout:
            key, num_rank = jax.random.fold_in(rng, number), update.lora_a.ndim
            is_stacked = num_rank > len(update.lora_a.axes)
            keys = jax.random.split(key, update.lora_a.shape[0]) if is_stacked else key
            setattr(update, _KEY, DropoutKey(keys))
    return model


def _drop(x: Float[Array, "B T *in"], key: Key[Array, ""], rate: float) -> Float[Array, "B T *in"]:
    layout = None if sharding.activation_spec() is None else jax.typeof(x).sharding.spec
    is_kept = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=layout)
    return jnp.where(is_kept, x / (1 - rate), 0).astype(x.dtype)


def is_added(path: str) -> bool:
    """Whether the parameter at this path is an A or a B."""
    return path.rpartition("/")[2] in (A, B)


def merge(params: Params, config: LoRAConfig) -> Params:
    """The parameters of the plain model with the same outputs: every W is W + scale A B, in float32."""
    updates, plain = param_trees.split(params, is_added)
    return param_trees.join(plain, _merged(plain, updates, config.scale))


def _merged(plain: Params, updates: Params, scale: float) -> Params:
    if A in updates:
        return {"kernel": _add_product(plain["kernel"], updates[A], updates[B], scale)}
    return {key: _merged(plain[key], inner, scale) for key, inner in updates.items()}


@functools.partial(jax.jit, static_argnames="scale")
def _add_product(
    kernel: Float[Array, "*in_out"],
    a: Float[Array, "*in_rank"],
    b: Float[Array, "*rank_out"],
    scale: float,
) -> Float[Array, "*in_out"]:
    multiply = lambda a, b: jnp.tensordot(a, b, 1)
    if a.ndim + b.ndim - 2 > kernel.ndim:  # Both have the axis of layers.
        multiply = jax.vmap(multiply)
    return kernel.astype(jnp.float32) + scale * multiply(a, b)
