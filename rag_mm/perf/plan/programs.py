"""A program to compile for a TPU topology, what it costs at least, and the meshes it is compiled for."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.perf import chips
from rag_mm.perf.plan import hlo


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's report for one chip, in bytes; without figures if the program does not fit.

    `flops` and `moved_bytes` are its own counts of arithmetic and of memory traffic, a loop's body counted
    once.
    """

    fits: bool
    peak_bytes: int
    hbm_bytes: int
    argument_bytes: int | None = None
    temp_bytes: int | None = None
    alias_bytes: int | None = None
    flops: float | None = None
    moved_bytes: float | None = None
    collectives: tuple[hlo.Collective, ...] = ()


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one step of a program costs.

    Attributes:
        item: what it processes: token or image.
        num_items: how many, on all chips.
        flops: model FLOPs per item, without what is computed twice.
        hardware_flops: FLOPs per item with it.
        hbm_bytes: moved through the memory of one chip.
        dcn_bytes: sent by one chip to other slices.
        num_steps: steps in one run of the program, such as decoded tokens.
    """

    item: str
    num_items: float
    flops: float
    hardware_flops: float
    hbm_bytes: float
    dcn_bytes: float = 0.0
    num_steps: int = 1


@dataclasses.dataclass(frozen=True)
class Program:
    """What `compile_plan` needs to know of a program.

    Attributes:
        lower: mesh -> the program on abstract arguments.
        mesh_shape: data, fsdp, tensor.
        costs: the compiler's report -> costs; None where they are unknown.
        facts: keys of the plan that describe the program: `batch_size`, `num_parts`, `remat` and others.
    """

    lower: Callable[[Mesh], jax.stages.Lowered]
    mesh_shape: tuple[int, int, int]
    costs: Callable[[Compiled], Costs | None]
    facts: Mapping[str, Any]


def make_mesh(topology: chips.Topology, mesh_shape: tuple[int, int, int]) -> Mesh:
    """The mesh over a topology's chips, with slices along `data`.

    Raises:
        UserError: the shape does not match the chips, or libtpu is missing or does not know the topology.
    """
    if math.prod(mesh_shape) != topology.num_chips or mesh_shape[0] % topology.num_slices:
        raise UserError(
            f"A mesh {'x'.join(map(str, mesh_shape))} does not fit {topology.num_slices} x "
            f"{topology.name}: its product must be the number of chips, {topology.num_chips}, and its "
            "first dimension a multiple of the slices."
        )
    options = dict(topology.chip.options, num_slices=topology.num_slices)
    try:
        description = topologies.get_topology_desc(topology.name, platform="tpu", **options)
    except Exception as error:  # libtpu does not document its exceptions.
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"The TPU compiler has no topology {topology.name} ({reason}); pip install 'rag_mm[tpu]'."
        ) from error
    devices = sorted(description.devices, key=lambda d: (getattr(d, "slice_index", 0) or 0, d.id))
    per_slice = (mesh_shape[0] // topology.num_slices, *mesh_shape[1:])
    slices = np.array(devices).reshape(topology.num_slices, -1)
    grids = [
        mesh_utils.create_device_mesh(
            per_slice, list(chips_of_slice), allow_split_physical_axes=True
        )
        for chips_of_slice in slices
    ]
    return Mesh(np.concatenate(grids), sharding.MESH_AXES, axis_types=(AxisType.Explicit,) * 3)


@functools.cache
def hbm_bytes(topology: chips.Topology) -> int:
    """Usable HBM of one chip, read from the compiler's error for a program that is far too large."""
    mesh = make_mesh(topology, (topology.num_slices, topology.num_chips // topology.num_slices, 1))
    huge = jax.ShapeDtypeStruct(
        (1 << 20, 1 << 20), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    try:
        jax.jit(jnp.negative).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = read_refusal(str(error))
        if sizes is None:
            raise
        return sizes[1]
    raise RuntimeError(f"the compiler accepted a program of 4 TiB for one chip of {topology.name}")


def read_refusal(message: str) -> tuple[int, int] | None:
    """Required and available bytes from the compiler's error message; None if it is not about memory."""
    size = r"([\d.]+)([KMGT])"
    match = re.search(rf"Used {size} of {size} hbm", message) or re.search(
        rf"temporaries \({size}\) exceeds available HBM \({size}\)", message
    )
    if match is None:
        return None
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    required, unit, limit, limit_unit = match.groups()
    return int(float(required) * units[unit]), int(float(limit) * units[limit_unit])
