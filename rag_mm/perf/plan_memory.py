"""Compiles the search of a `device` memory for TPUs that are not here: does it fit, what does it move."""

import os
import re
from typing import Any

from rag_mm.core.errors import UserError

# HBM of one chip in GiB, from the makers' pages (cloud.google.com/tpu/docs/system-architecture-tpu-vm).
_HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
_COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
_K = 10


def set_environment() -> None:
    """Lets libtpu compile on a machine without a TPU; to be called before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


def plan(
    num_rows: int,
    dim: int,
    topology: str,
    num_queries: int = 256,
    recall_target: float = 0.95,
) -> dict[str, Any]:
    """The compiled search for the 10 best of bfloat16 rows [num_rows, dim] over every chip.

    Args:
        num_rows, dim: of the memory.
        topology: kind and shape, such as `v5e:16x16`.
        num_queries: of one batch.
        recall_target: see `DeviceConfig`.

    Returns:
        `fits`, `peak_bytes` and `hbm_bytes` of one chip, `collectives` (count by kind),
        `flops_per_query` on all chips, `num_chips`, `rows_per_chip`; where it does not fit, `reason`.

    Raises:
        UserError: no such topology, or libtpu is not installed.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from rag_mm.memory import device_index

    devices = np.array(_describe(topology).devices).reshape(-1)
    mesh = Mesh(devices, ("rows",), axis_types=(AxisType.Auto,))
    padded = -(-num_rows // mesh.size) * mesh.size
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("rows",), ()))
    shapes = (
        jax.ShapeDtypeStruct((padded, dim), jnp.bfloat16, sharding=split),
        jax.ShapeDtypeStruct((padded,), jnp.bool_, sharding=split),
        jax.ShapeDtypeStruct((num_queries, dim), jnp.bfloat16, sharding=whole),
    )
    result = {
        "hbm_bytes": _HBM_GIB[topology.partition(":")[0]] << 30,
        "num_chips": mesh.size,
        "rows_per_chip": padded // mesh.size,
        "num_queries": num_queries,
        "flops_per_query": 2 * num_rows * dim,
    }
    try:
        compiled = device_index.make_search(mesh, _K, recall_target).lower(*shapes).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        return {"fits": False, "peak_bytes": None, "collectives": {}, "reason": reason, **result}
    memory = compiled.memory_analysis()
    found = re.findall(rf"\b({_COLLECTIVES})(?:-start)?\(", compiled.as_text())
    return {
        "fits": memory.peak_memory_in_bytes <= result["hbm_bytes"],
        "peak_bytes": memory.peak_memory_in_bytes,
        "collectives": {kind: found.count(kind) for kind in sorted(set(found))},
        **result,
    }


def _describe(topology: str) -> Any:
    from jax.experimental import topologies

    kind, _, shape = topology.partition(":")
    if kind not in _HBM_GIB or not re.fullmatch(r"\d+x\d+(x\d+)?", shape):
        kinds = ", ".join(_HBM_GIB)
        raise UserError(f"There is no topology {topology!r}: write KIND:AxB, of {kinds}.")
    more = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **more)
    except Exception as error:  # Without libtpu, or for a shape that no pod has.
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{topology} cannot be compiled for ({reason}): pip install '.[tpu]', and name a shape "
            "that exists."
        ) from error
