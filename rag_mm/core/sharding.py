"""One mesh, `data x fsdp x tensor`, and one table from logical axis names to its axes.

Parameters name their logical axes; explicit sharding then carries the layout in every array's type. Inside
a layer a parameter is gathered over `fsdp` (FSDP's all-gather) and stays split over `tensor`. Without a mesh
in context every function here is the identity, so a model also runs in a plain notebook cell.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
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


def sum_over_batch(
    function: Callable[..., jax.Array],
    activations: Sequence[jax.Array],
    layouts: Sequence[tuple[str | None, ...]],
    axes: tuple[str | None, ...],
) -> jax.Array:
    """function(*activations), a sum over rows, in the layout of a parameter with these logical axes.

    Each device applies `function` to its own rows; the sums are then reduce-scattered over `fsdp`. Asked for
    a product in that layout, the partitioner would all-reduce it, or go round the ring device by device.

    Args:
        function: of one device's activations; linear in their rows.
        activations: arrays whose first axis is `batch`.
        layouts: the logical axes of each.
        axes: those of the result.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function(*activations)

    def add(*parts: jax.Array) -> jax.Array:
        total = function(*parts)
        if "embed" not in axes:
            return jax.lax.psum(total, ("data", "fsdp"))
        return jax.lax.psum(_scatter(total, axes.index("embed")), "data")

    in_specs = tuple(activation_spec(*layout) for layout in layouts)
    summed = jax.shard_map(add, in_specs=in_specs, out_specs=parameter_spec(axes), check_vma=False)
    return summed(*activations)


def _scatter(total: jax.Array, at: int) -> jax.Array:
    """The sum of all `fsdp` devices' arrays, axis `at` split over them.

    The TPU compiler (libtpu 0.0.42) makes an all-reduce of a reduce-scatter over a whole torus, or over any
    axis but the last; one side of the torus after the other, along the last axis, it takes as it stands.
    """
    size = jax.lax.axis_size("fsdp")
    inner = max(k for k in range(1, math.isqrt(size) + 1) if size % k == 0)
    devices = np.arange(size).reshape(-1, inner)
    total = jnp.moveaxis(total, at, -1)
    for groups in (devices.T, devices) if inner > 1 else (devices.reshape(1, -1),):
        total = jax.lax.psum_scatter(
            total,
            "fsdp",
            scatter_dimension=total.ndim - 1,
            tiled=True,
            axis_index_groups=groups.tolist(),
        )
    return jnp.moveaxis(total, -1, at)


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


def local_rows(num_rows: int, mesh: Mesh) -> range:
    """The rows of a batch that this process has devices for: all of them where it is the only one.

    Raises:
        ValueError: the batch axes do not divide the rows, or the process's rows do not follow one another.
    """
    placed = NamedSharding(mesh, PartitionSpec(ACTIVATION_AXES["batch"]))
    parts = placed.addressable_devices_indices_map((num_rows,)).values()
    bounds = sorted({part.indices(num_rows)[:2] for (part,) in parts})
    if any(end != start for (_, end), (start, _) in itertools.pairwise(bounds)):
        raise ValueError(f"the devices of process {jax.process_index()} do not lie side by side")
    return range(bounds[0][0], bounds[-1][1])


def batch_parts() -> int:
    """Over how many devices of the mesh in context a batch is split; 1 without one."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in ACTIVATION_AXES["batch"] or ())


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """A host batch (arrays [B, ...]) split over the batch axes of the mesh.

    Each of several processes has its own `local_rows`, which together are the batch.
    """
    sharding = NamedSharding(mesh, PartitionSpec(ACTIVATION_AXES["batch"]))
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(functools.partial(_put_rows, sharding=sharding, mesh=mesh), batch)


def _put_rows(x: np.ndarray, sharding: NamedSharding, mesh: Mesh) -> jax.Array:
    num_parts = math.prod(mesh.shape[axis] for axis in ACTIVATION_AXES["batch"] or ())
    num_local = len(local_rows(num_parts, mesh))
    num_rows = len(x) // num_local * num_parts
    first = local_rows(num_rows, mesh).start

    def take(index: tuple[slice, ...]) -> np.ndarray:
        start, end, _ = index[0].indices(num_rows)
        return x[start - first : end - first]

    return jax.make_array_from_callback((num_rows, *x.shape[1:]), sharding, take)


def split_batch(batch: dict, num_parts: int) -> dict:
    """Arrays [B, ...] as [num_parts, B / num_parts, ...]; every device splits the rows that it has.

    Raises:
        ValueError: B is not a multiple of num_parts.
    """

    def split(x: jax.Array) -> jax.Array:
        rows, rest = divmod(x.shape[0], num_parts)
        if rest:
            raise ValueError(f"a batch of {x.shape[0]} rows does not split into {num_parts} parts")
        tail = (None,) * (x.ndim - 1)
        parts = jax.lax.reshape(
            x, (rows, num_parts, *x.shape[1:]), out_sharding=activation_spec("batch", None, *tail)
        )
        return jnp.moveaxis(parts, 1, 0)

    return jax.tree.map(split, batch)


def place(x: jax.Array, *axes: str | None) -> jax.Array:
    """The activation laid out by its logical axes; all None puts it whole on every device."""
    spec = activation_spec(*axes)
    return x if spec is None else jax.sharding.reshard(x, spec)
