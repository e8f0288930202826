"""One mesh, `data x fsdp x tensor`, and one table from logical axis names to its axes.

Parameters name their logical axes; explicit sharding then carries the layout in every array's type. Inside
a layer a parameter is gathered over `fsdp` (FSDP's all-gather) and stays split over `tensor`. Without a mesh
in context every function here is the identity, so a model also runs in a plain notebook cell.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# What a logical axis of a parameter is split over.
PARAMETER_AXES: dict[str | None, str | tuple[str, ...] | None] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    None: None,
}
# What a logical axis of an activation is split over: its width is whole on every device.
ACTIVATION_AXES = PARAMETER_AXES | {
    "batch": ("data", "fsdp"),
    "embed": None,
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, is_explicit: bool = True) -> Mesh:
    """A mesh over the first data * fsdp * tensor devices.

    Its axes are explicit, except for models of stock convolutions, which are only ever split by batch
    and leave the rest to the partitioner.

    Raises:
        ValueError: fewer devices are present.
    """
    kind = AxisType.Explicit if is_explicit else AxisType.Auto
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=(kind,) * 3)


def parameter_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Where a parameter with these logical axes rests between steps."""
    return PartitionSpec(*(PARAMETER_AXES[axis] for axis in axes))


def activation_spec(*axes: str | None) -> PartitionSpec | None:
    """The layout of an activation, or None where no mesh is in context."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return PartitionSpec(*(ACTIVATION_AXES[axis] for axis in axes))


def resting_spec(*axes: str | None) -> PartitionSpec | None:
    """`parameter_spec` of the axes, or None where no mesh is in context."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return parameter_spec(axes)


def gather(parameter: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """The parameter as a layer uses it: whole over `fsdp`, still split over `tensor`."""
    if jax.sharding.get_abstract_mesh().empty:
        return parameter
    spec = (None if axis == "embed" else PARAMETER_AXES[axis] for axis in axes)
    return jax.sharding.reshard(parameter, PartitionSpec(*spec))


def platform() -> str:
    """What the program being traced is for: the context mesh's devices, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """A host batch (arrays [B, ...]) split over the batch axes of the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(ACTIVATION_AXES["batch"]))
    return jax.device_put(batch, sharding)


def place(x: jax.Array, *axes: str | None) -> jax.Array:
    """The activation laid out by its logical axes; all None puts it whole on every device."""
    spec = activation_spec(*axes)
    return x if spec is None else jax.sharding.reshard(x, spec)
