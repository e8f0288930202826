"""Compiles a step ahead of time for a TPU topology and estimates its cost.

The step time is a roofline: the slowest of compute, HBM and interconnect at their published peaks, assuming
perfect overlap. The MFU bound is model FLOPs divided by the peak FLOPs of the chips in that time.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from rag_mm.core import progress
from rag_mm.perf import chips
from rag_mm.perf.plan import hlo, programs


def make_plan(program: programs.Program, topology: chips.Topology) -> dict[str, Any]:
    """Compiles the program and returns its report, the keys of `rag-mm plan --json`.

    Raises:
        UserError: topology, mesh and batch are incompatible.
    """
    mesh = programs.make_mesh(topology, program.mesh_shape)
    return report(program, topology, compile_program(program.lower(mesh), topology))


def search(
    program: programs.Program,
    vary: Callable[[str, int], programs.Program | None],
    remats: Sequence[str],
    topology: chips.Topology,
) -> dict[str, Any]:
    """The plan with the highest MFU bound among those that fit, over microbatches and remat.

    A batch that does not fit is split into twice as many microbatches with accumulated gradients, so the
    optimizer step stays the same. If nothing fits, the last plan is returned.

    Args:
        program: a training step.
        vary: (remat, microbatches) -> the step with these; None if it cannot fit, and is not compiled.
        remats: what `vary` takes, the least recomputation first.
        topology: the target.

    Raises:
        UserError: as `make_plan`.
    """
    tried: list[dict[str, Any]] = []
    shards = program.mesh_shape[0] * program.mesh_shape[1]
    parts, batch_size = program.facts["num_parts"], program.facts["batch_size"]
    # More parts mean more communication, so they only pay off with less remat than what already fits.
    while batch_size % (parts * shards) == 0 and remats:
        for remat in remats:
            candidate = vary(remat, parts)
            if candidate is None:
                continue
            progress.say(f"plan: {remat} remat, {batch_size // parts} per microbatch")
            tried.append(make_plan(candidate, topology))
            if tried[-1]["fits"]:
                remats = remats[: remats.index(remat)]
                break
        parts *= 2
    if not tried:
        return make_plan(program, topology)
    # Where costs are unknown, the first that fits: it has the fewest microbatches.
    bound = lambda plan: plan.get("mfu_bound", 0.0)
    best = max((p for p in tried if p["fits"]), key=bound, default=tried[-1])
    keys = ("batch_size", "num_parts", "remat", "fits", "peak_bytes", "mfu_bound")
    return best | {"tried": [{key: plan.get(key) for key in keys} for plan in tried]}


def report(
    program: programs.Program, topology: chips.Topology, compiled: programs.Compiled
) -> dict[str, Any]:
    """The plan as plain values; see `make_plan`."""
    costs = program.costs(compiled)
    return {
        "fits": compiled.fits,
        "over_bytes": max(0, compiled.peak_bytes - compiled.hbm_bytes),
        **{f.name: getattr(compiled, f.name) for f in dataclasses.fields(compiled)[1:-1]},
        "collectives": hlo.count(list(compiled.collectives)),
        "collective_bytes": _bytes_by_kind(compiled),
        **({} if costs is None else _bound(costs, topology, compiled)),
        "topology": topology.name,
        "num_slices": topology.num_slices,
        "num_chips": topology.num_chips,
        "mesh": dict(zip(("data", "fsdp", "tensor"), program.mesh_shape, strict=True)),
        **program.facts,
        "peaks": dataclasses.asdict(topology.chip),
    }


def _bound(
    costs: programs.Costs, topology: chips.Topology, compiled: programs.Compiled
) -> dict[str, Any]:
    """The keys of the roofline."""
    chip, item = topology.chip, costs.item
    peak = topology.num_chips * chip.flops
    sent = sum(c.sent_bytes * c.times for c in compiled.collectives) / costs.num_steps
    seconds = {
        "compute": costs.hardware_flops * costs.num_items / peak,
        "hbm": costs.hbm_bytes / chip.hbm_bandwidth,
        "ici": sent / chip.ici_bandwidth,
        "dcn": costs.dcn_bytes / chips.DCN_BANDWIDTH,
    }
    step = max(seconds.values())
    return {
        f"flops_per_{item}": costs.flops,
        f"hardware_flops_per_{item}": costs.hardware_flops,
        "seconds": seconds,
        "step_seconds": step,
        f"{item}s_per_second": costs.num_items / step,
        "mfu_bound": costs.flops * costs.num_items / (peak * step),
    }


def _bytes_by_kind(compiled: programs.Compiled) -> dict[str, float]:
    return {
        kind: sum(c.sent_bytes * c.times for c in compiled.collectives if c.kind == kind)
        for kind in hlo.KINDS
    }


def compile_program(lowered: jax.stages.Lowered, topology: chips.Topology) -> programs.Compiled:
    """Compiles a program; one that the compiler rejects for lack of memory does not fit."""
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = programs.read_refusal(str(error))
        if sizes is None:
            raise
        return programs.Compiled(False, *sizes)
    memory, counts = program.memory_analysis(), program.cost_analysis() or {}
    return programs.Compiled(
        True,
        memory.peak_memory_in_bytes,
        programs.hbm_bytes(topology),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        counts.get("flops"),
        counts.get("bytes accessed"),
        tuple(hlo.read_collectives(program.as_text())),
    )
