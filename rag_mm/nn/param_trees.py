"""Parameters as plain nested dicts: their shapes and shardings, and sharded initialization."""

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


def init_params(make_model: Callable[[], nnx.Module], mesh: Mesh) -> Params:
    """Newly initialized parameters, each created directly in its sharding."""
    _, abstract = describe(make_model, mesh)

    def init() -> Params:
        return nnx.to_pure_dict(nnx.split(make_model(), nnx.Param)[1])

    return jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()
