"""Compiles the search of a `device` index ahead of time for a TPU topology: memory and collectives."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rag_mm.memory.index import device
from rag_mm.perf import chips
from rag_mm.perf.plan import compile_plan, hlo, programs

_K = 10


def make_plan(
    num_rows: int,
    dim: int,
    topology: chips.Topology,
    num_queries: int = 256,
    recall_target: float = 0.95,
) -> dict[str, Any]:
    """Compiles a top-10 search over bfloat16 embeddings [num_rows, dim] sharded over all chips.

    Args:
        num_rows, dim: size of the memory.
        topology: the target.
        num_queries: batch size.
        recall_target: see `DeviceConfig`.

    Returns:
        `fits`, `over_bytes`, `peak_bytes` and `hbm_bytes` of one chip, `collectives` (count by kind),
        `flops_per_query` on all chips, `num_chips`, `rows_per_chip`, `num_queries`.

    Raises:
        UserError: libtpu is not installed or does not know the topology.
    """
    num_chips = topology.num_chips
    along = (topology.num_slices, num_chips // topology.num_slices, 1)
    devices = programs.make_mesh(topology, along).devices.reshape(-1)
    mesh = Mesh(devices, ("rows",), axis_types=(AxisType.Auto,))
    padded = -(-num_rows // num_chips) * num_chips
    sharded, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("rows",), ()))
    shapes = (
        jax.ShapeDtypeStruct((num_queries, dim), jnp.bfloat16, sharding=replicated),
        jax.ShapeDtypeStruct((padded, dim), jnp.bfloat16, sharding=sharded),
        jax.ShapeDtypeStruct((padded,), jnp.bool_, sharding=sharded),
    )
    search = device.make_search(mesh, _K, recall_target)
    compiled = compile_plan.compile_program(search.lower(*shapes), topology)
    return {
        "program": f"search of {num_rows:,} x {dim}",
        "topology": topology.name,
        "num_chips": num_chips,
        "fits": compiled.fits,
        "over_bytes": max(0, compiled.peak_bytes - compiled.hbm_bytes),
        "peak_bytes": compiled.peak_bytes,
        "hbm_bytes": compiled.hbm_bytes,
        "collectives": hlo.count(list(compiled.collectives)),
        "rows_per_chip": padded // num_chips,
        "num_queries": num_queries,
        "flops_per_query": 2 * num_rows * dim,
    }
