"""Sharding: one mesh, `data x fsdp x tensor`, and one table from logical axis names to mesh axes.

Parameters name their logical axes; explicit sharding then carries the layout in every array's type. A layer
gathers its parameters over `fsdp` (FSDP's all-gather) and keeps them split over `tensor`. Without a mesh in
context the layout functions return their input unchanged, so a model also runs in a plain notebook cell.

Parts made of stock layers, such as the convolutions of image tokenizers, name no layouts. They are functions
under `automatic`, in which the partitioner chooses them, and can be in one program with all others.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

P = ParamSpec("P")
T = TypeVar("T")
MESH_AXES = ("data", "fsdp", "tensor")

# The mesh axes over which a logical axis of a parameter is split.
PARAMETER_AXES: dict[str | None, str | tuple[str, ...] | None] = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    None: None,
}
# The same for an activation, whose embedding dimension is not split.
ACTIVATION_AXES = PARAMETER_AXES | {
    "batch": ("data", "fsdp"),
    "embed": None,
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first data * fsdp * tensor devices, with explicit axes.

    Args:
        data, fsdp, tensor: sizes of the mesh axes.

    Raises:
        ValueError: there are fewer devices.
    """
    return jax.make_mesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Explicit,) * 3)


def automatic(*axes: str | None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorates a function in which the partitioner chooses all layouts, given those of its arguments.

    Gradients pass through it. Without a mesh in context, and inside another such function, it changes
    nothing.

    Args:
        axes: the logical axes of the first dimensions of every result: "batch" for one value per example;
            none where results are sums, which are then on every device.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
                return function(*args, **kwargs)
            # Other leaves, such as sizes, stay Python values.
            leaves, structure = jax.tree.flatten((args, kwargs))
            arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)}

            def run(arrays: dict[int, jax.Array]) -> T:
                merged = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
                args, kwargs = jax.tree.unflatten(structure, merged)
                return function(*args, **kwargs)

            return jax.sharding.auto_axes(run, out_sharding=activation_spec(*axes))(arrays)

        return call

    return decorate


def parameter_spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """The layout of a parameter with these logical axes between steps."""
    return PartitionSpec(*(PARAMETER_AXES[axis] for axis in axes))


def activation_spec(*axes: str | None) -> PartitionSpec | None:
    """The layout of an activation, or None without a mesh in context."""
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return PartitionSpec(*(ACTIVATION_AXES[axis] for axis in axes))


def sum_over_batch(
    function: Callable[..., jax.Array],
    activations: Sequence[jax.Array],
    layouts: Sequence[tuple[str | None, ...]],
    axes: tuple[str | None, ...],
) -> jax.Array:
    """function(*activations), a sum over the batch, in the layout of a parameter with these logical axes.

    Each device applies `function` to its part of the batch; the partial sums are reduce-scattered over
    `fsdp`. For a plain product in that layout the partitioner would all-reduce instead, or pass the parts
    around the ring of devices.

    Args:
        function: sums over the batch axis of one device's activations.
        activations: arrays whose first axis is `batch`.
        layouts: the logical axes of each activation.
        axes: the logical axes of the result.
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
    """The sum of the arrays of all `fsdp` devices, with axis `at` split over these devices.

    The TPU compiler (libtpu 0.0.42) turns a reduce-scatter over a whole torus, or along any axis but the
    last, into an all-reduce. It keeps one along the last axis over one side of the torus, hence two stages.
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
    """The parameter as a layer uses it: gathered over `fsdp`, still split over `tensor`."""
    if jax.sharding.get_abstract_mesh().empty:
        return parameter
    spec = (None if axis == "embed" else PARAMETER_AXES[axis] for axis in axes)
    return jax.sharding.reshard(parameter, PartitionSpec(*spec))


def platform() -> str:
    """The target platform of the program being traced: that of the context mesh, which may be abstract."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def local_rows(num_rows: int, mesh: Mesh) -> range:
    """The examples of a batch of `num_rows` that this process's devices hold; all of them for one process.

    Raises:
        ValueError: the batch axes do not divide the batch, or the process's examples are not contiguous.
    """
    placed = NamedSharding(mesh, PartitionSpec(ACTIVATION_AXES["batch"]))
    parts = placed.addressable_devices_indices_map((num_rows,)).values()
    bounds = sorted({part.indices(num_rows)[:2] for (part,) in parts})
    if any(end != start for (_, end), (start, _) in itertools.pairwise(bounds)):
        raise ValueError(
            f"the devices of process {jax.process_index()} are not adjacent in the mesh"
        )
    return range(bounds[0][0], bounds[-1][1])


def batch_parts() -> int:
    """The number of parts that the mesh in context splits a batch into; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in ACTIVATION_AXES["batch"] or ())


def put_batch(batch: dict, mesh: Mesh) -> dict:
    """Puts a host batch (arrays [B, ...]) on devices, split over the batch axes of the mesh.

    With several processes each passes only its `local_rows` of the batch.
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


def sum_rows(values: np.ndarray, mesh: Mesh) -> float:
    """The sum of one value for each example of a batch, in every process.

    Args:
        values: float [rows], those of this process's `local_rows`. An example that several processes hold
            counts once. Every process calls this, in the same order.
        mesh: the mesh of the batch.
    """
    if jax.process_count() == 1:
        return float(values.sum())
    placed = put_batch({"values": values.astype(np.float32)}, mesh)["values"]
    add = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return float(add(placed))


def split_batch(batch: dict, num_parts: int) -> dict:
    """Reshapes arrays [B, ...] to [num_parts, B / num_parts, ...]; every device splits its own examples.

    Raises:
        ValueError: B is not a multiple of num_parts.
    """

    def split(x: jax.Array) -> jax.Array:
        rows, rest = divmod(x.shape[0], num_parts)
        if rest:
            raise ValueError(f"a batch of {x.shape[0]} does not split into {num_parts} equal parts")
        tail = (None,) * (x.ndim - 1)
        parts = jax.lax.reshape(
            x, (rows, num_parts, *x.shape[1:]), out_sharding=activation_spec("batch", None, *tail)
        )
        return jnp.moveaxis(parts, 1, 0)

    return jax.tree.map(split, batch)


def place(x: jax.Array, *axes: str | None) -> jax.Array:
    """The activation in the layout of its logical axes; all None replicates it on every device."""
    spec = activation_spec(*axes)
    return x if spec is None else jax.sharding.reshard(x, spec)
