"""Parameters as plain nested dicts: shapes and shardings, sharded initialization, parts chosen by path."""

import fnmatch
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from rag_mm.core import sharding
from rag_mm.core.errors import UserError

Params = dict[str, Any]
# Whether the parameter at a path such as `stack/blocks/mlp/up/kernel` is meant.
IsChosen = Callable[[str], bool]


def describe(
    make_model: Callable[[], nnx.Module], mesh: Mesh | None
) -> tuple[nnx.GraphDef, Params]:
    """The model's structure, and its parameters as ShapeDtypeStructs with shardings; allocates no array.

    A parameter's logical axes are in its metadata (`rag_mm.nn.layers`). Parameters of stock Flax layers have
    none and are replicated. Parameters of a `Stack` have a leading `layers` axis. Without a mesh, everything
    is on one device.
    """
    graphdef, abstract = nnx.split(jax.eval_shape(make_model), nnx.Param)
    one_device = SingleDeviceSharding(jax.local_devices()[0])

    def lay_out(variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        leaf = variable.get_value()
        axes = variable.get_metadata().get("axes", (None,) * leaf.ndim)
        if len(axes) < leaf.ndim:
            axes = ("layers", *axes)
        layout = one_device
        if mesh is not None:
            layout = NamedSharding(mesh, sharding.parameter_spec(axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)

    is_variable = lambda node: isinstance(node, nnx.Variable)
    described = jax.tree.map(lay_out, abstract, is_leaf=is_variable)
    return graphdef, nnx.to_pure_dict(described)


def check_split(abstract: Params, remedy: str) -> None:
    """Raises UserError, which begins with `remedy`, for a parameter whose axes its mesh does not divide."""
    for path, leaf in leaves_by_path(abstract).items():
        try:
            leaf.sharding.shard_shape(leaf.shape)
        except ValueError:
            sizes, axes = dict(leaf.sharding.mesh.shape), tuple(leaf.sharding.spec)
            raise UserError(
                f"{remedy}, or a model of other sizes: {path} of shape {leaf.shape} does not split over the "
                f"mesh {sizes}, where its axes are split over {axes}."
            ) from None


def init_params(
    make_model: Callable[[], nnx.Module], mesh: Mesh, given: Params | None = None
) -> Params:
    """Newly initialized parameters, each created directly in its sharding.

    Those that `given` has are taken from there, and not created.
    """
    _, abstract = describe(make_model, mesh)
    is_given = leaves_by_path(given or {}).__contains__
    missing = split(abstract, is_given)[1]

    def init() -> Params:
        return split(nnx.to_pure_dict(nnx.split(make_model(), nnx.Param)[1]), is_given)[1]

    made = jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, missing))()
    return join(given or {}, made)


def leaves_by_path(params: Params) -> dict[str, Any]:
    """Leaves by path, such as `stack/blocks/mlp/up/kernel`, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    path_of = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {path_of(path): leaf for path, leaf in leaves}


def matching(patterns: Sequence[str], params: Params, name: str) -> IsChosen:
    """Whether a path of `params` matches one of the patterns, in which `*` stands for anything, also `/`.

    Raises:
        UserError: a pattern matches no parameter; `name`, the setting that holds it, is part of the message.
    """
    paths = list(leaves_by_path(params))
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise UserError(
                f"{name} has the pattern {pattern!r}, which matches no parameter; parameters are "
                f"{', '.join(paths)}."
            )
    return lambda path: any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def split(params: Params, is_chosen: IsChosen) -> tuple[Params, Params]:
    """The chosen leaves and the others, as two trees that are disjoint and have no empty branches."""
    chosen: Params = {}
    others: Params = {}

    def divide(tree: dict[Any, Any], parts: tuple[dict, dict], prefix: str) -> None:
        for key, value in tree.items():
            path = f"{prefix}{key}"
            if not isinstance(value, dict):
                parts[0 if is_chosen(path) else 1][key] = value
                continue
            inner: tuple[dict, dict] = ({}, {})
            divide(value, inner, f"{path}/")
            for part, found in zip(parts, inner, strict=True):
                if found:
                    part[key] = found

    divide(params, (chosen, others), "")
    return chosen, others


def join(params: dict[Any, Any], more: dict[Any, Any]) -> dict[Any, Any]:
    """The leaves of both trees; where both have one, that of `more`."""
    joined = dict(params)
    for key, value in more.items():
        is_branch = isinstance(value, dict) and isinstance(joined.get(key), dict)
        joined[key] = join(joined[key], value) if is_branch else value
    return joined


def bit_sums(params: Params) -> dict[str, list[int]]:
    """For each path the sums of bits of this process's parts of the array, computed where they are.

    A change of any one value changes the sum of its part.
    """
    return {
        path: [int(_bit_sum(part.data)) for part in leaf.addressable_shards]
        for path, leaf in leaves_by_path(params).items()
    }


@jax.jit
def _bit_sum(values: jax.Array) -> jax.Array:
    """Sum modulo 2^32 of the bits, each value's times an odd number of its own."""
    width = 8 * values.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(values, jnp.dtype(f"uint{width}")).astype(jnp.uint32)
    weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape) + 1
    return (bits * weights).sum(dtype=jnp.uint32)
