"""Compiles a step ahead of time for a TPU topology and estimates its cost.

The step time is a roofline: the slowest of compute, HBM and interconnect at their published peaks, assuming
perfect overlap. The MFU bound is model FLOPs divided by the peak FLOPs of the chips in that time.
"""

import dataclasses
from typing import Any

import jax

from rag_mm.core import progress
from rag_mm.nn.block import REMAT
from rag_mm.perf import chips, flops
from rag_mm.perf.plan import hlo, programs, traffic


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's report for one chip, in bytes; `collectives` is empty if compilation failed."""

    fits: bool
    peak_bytes: int
    hbm_bytes: int
    argument_bytes: int | None = None
    temp_bytes: int | None = None
    alias_bytes: int | None = None
    collectives: tuple[hlo.Collective, ...] = ()


def make_plan(case: programs.Case, topology: chips.Topology) -> dict[str, Any]:
    """Compiles the case and returns its report, the keys of `rag-mm plan --json`.

    Raises:
        UserError: topology, mesh and batch are incompatible.
    """
    mesh = programs.make_mesh(topology, case.mesh_shape)
    lower = programs.lower_decode if case.num_new else programs.lower_train
    compiled = compile_program(lower(case, mesh), topology)
    return report(case, topology, compiled)


def search(case: programs.Case, topology: chips.Topology) -> dict[str, Any]:
    """The plan with the highest MFU bound among those that fit, over microbatches and remat.

    A batch that does not fit is split into twice as many microbatches with accumulated gradients, so the
    optimizer step stays the same. Cases whose activations alone exceed a chip's memory are not compiled. If
    nothing fits, the last plan is returned.

    Raises:
        UserError: as `make_plan`.
    """
    tried: list[dict[str, Any]] = []
    shards = case.mesh_shape[0] * case.mesh_shape[1]
    parts, remats = case.num_parts, list(REMAT)
    # More parts mean more communication, so they only pay off with less remat than what already fits.
    while case.batch_size % (parts * shards) == 0 and remats:
        for remat in remats:
            model = dataclasses.replace(
                case.model, decoder=dataclasses.replace(case.model.decoder, remat=remat)
            )
            candidate = dataclasses.replace(case, model=model, num_parts=parts)
            if traffic.kept_bytes(candidate) > programs.hbm_bytes(topology):
                continue
            progress.say(
                f"plan: {remat} remat, {case.batch_size // parts} sequences per microbatch"
            )
            tried.append(make_plan(candidate, topology))
            if tried[-1]["fits"]:
                remats = remats[: remats.index(remat)]
                break
        parts *= 2
    if not tried:
        return make_plan(case, topology)
    best = max((p for p in tried if p["fits"]), key=lambda p: p["mfu_bound"], default=tried[-1])
    keys = ("batch_size", "num_parts", "remat", "fits", "peak_bytes", "mfu_bound")
    return best | {"tried": [{key: plan[key] for key in keys} for plan in tried]}


def report(case: programs.Case, topology: chips.Topology, compiled: Compiled) -> dict[str, Any]:
    """The plan as plain values; see `make_plan`."""
    config, chip = case.model.decoder, topology.chip
    length = config.max_seq_len
    if case.num_new:
        per_token = flops.decode_flops(config, length - case.num_new // 2)
        work, tokens = per_token, case.batch_size
    else:
        per_token = flops.train_flops(config, length)
        work = flops.hardware_flops(config, length, case.model.loss_chunks > 1)
        tokens = case.batch_size * length
    seconds = {
        "compute": work * tokens / (topology.num_chips * chip.flops),
        "hbm": traffic.hbm_bytes(case) / chip.hbm_bandwidth,
        "ici": _sent_bytes(case, compiled) / chip.ici_bandwidth,
        "dcn": traffic.dcn_bytes(case, topology.num_slices) / chips.DCN_BANDWIDTH,
    }
    step = max(seconds.values())
    return {
        "fits": compiled.fits,
        "over_bytes": max(0, compiled.peak_bytes - compiled.hbm_bytes),
        **{f.name: getattr(compiled, f.name) for f in dataclasses.fields(compiled)[1:-1]},
        "collectives": hlo.count(list(compiled.collectives)),
        "collective_bytes": _bytes_by_kind(compiled),
        "num_params": programs.count_params(case.model),
        "flops_per_token": per_token,
        "hardware_flops_per_token": work,
        "seconds": seconds,
        "step_seconds": step,
        "tokens_per_second": tokens / step,
        "mfu_bound": per_token * tokens / (topology.num_chips * chip.flops * step),
        "program": "decode" if case.num_new else "train",
        "topology": topology.name,
        "num_slices": topology.num_slices,
        "num_chips": topology.num_chips,
        "mesh": dict(zip(("data", "fsdp", "tensor"), case.mesh_shape, strict=True)),
        "batch_size": case.batch_size,
        "num_parts": case.num_parts,
        "seq_len": length,
        "remat": config.remat,
        "loss_chunks": case.model.loss_chunks,
        "peaks": dataclasses.asdict(chip),
    }


def _sent_bytes(case: programs.Case, compiled: Compiled) -> float:
    """Bytes that a chip sends per step; for decoding, prefill is spread over the new tokens."""
    total = sum(c.sent_bytes * c.times for c in compiled.collectives)
    return total / max(case.num_new, 1)


def _bytes_by_kind(compiled: Compiled) -> dict[str, float]:
    return {
        kind: sum(c.sent_bytes * c.times for c in compiled.collectives if c.kind == kind)
        for kind in hlo.KINDS
    }


def compile_program(lowered: jax.stages.Lowered, topology: chips.Topology) -> Compiled:
    """Compiles a program; one that the compiler rejects for lack of memory does not fit."""
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = programs.read_refusal(str(error))
        if sizes is None:
            raise
        return Compiled(False, *sizes)
    memory = program.memory_analysis()
    return Compiled(
        True,
        memory.peak_memory_in_bytes,
        programs.hbm_bytes(topology),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        tuple(hlo.read_collectives(program.as_text())),
    )
