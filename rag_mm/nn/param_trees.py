"""Parameters as plain nested dicts: described without making an array, made where they belong."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from rag_mm.core import sharding

Params = dict[str, Any]


def describe(
    make_model: Callable[[], nnx.Module], mesh: Mesh | None
) -> tuple[nnx.GraphDef, Params]:
    """The model's structure, and its parameters as shapes with shardings (one device without a mesh).

    A parameter's logical axes stand in its metadata (`rag_mm.nn.layers`); those of stock Flax layers have
    none and are replicated. Parameters of a `Stack` have a leading `layers` axis.
    """
    graphdef, abstract = nnx.split(jax.eval_shape(make_model), nnx.Param)
    one_device = SingleDeviceSharding(jax.local_devices()[0])

    def lay_out(variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        leaf = variable.get_value()
        axes = variable.get_metadata().get("axes", (None,) * leaf.ndim)
        if len(axes) < leaf.ndim:
            axes = ("layers", *axes)
        place = one_device
        if mesh is not None:
            place = NamedSharding(mesh, sharding.parameter_spec(axes))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    is_variable = lambda node: isinstance(node, nnx.Variable)
    placed = jax.tree.map(lay_out, abstract, is_leaf=is_variable)
    return graphdef, nnx.to_pure_dict(placed)


def init_params(make_model: Callable[[], nnx.Module], mesh: Mesh) -> Params:
    """The model's fresh parameters, each made directly in its own layout."""
    _, abstract = describe(make_model, mesh)

    def init() -> Params:
        return nnx.to_pure_dict(nnx.split(make_model(), nnx.Param)[1])

    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
