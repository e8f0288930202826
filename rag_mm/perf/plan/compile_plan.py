"""What a step costs on chips that are not here: compiled by their own compiler, then read.

The step time is a roofline: the slowest of arithmetic, memory and links at their published peaks, each
thought to run beside the others. The MFU bound follows: model FLOPs over what the chips could have done.
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
    """What the compiler says of one chip, in bytes; `collectives` is empty where it gave up."""

    fits: bool
    peak_bytes: int
    hbm_bytes: int
    argument_bytes: int | None = None
    temp_bytes: int | None = None
    alias_bytes: int | None = None
    collectives: tuple[hlo.Collective, ...] = ()


def make_plan(case: programs.Case, topology: chips.Topology) -> dict[str, Any]:
    """Compiles the case and reports; the keys are those of `rag-mm plan --json`.

    Raises:
        UserError: the topology, mesh or batch does not fit together.
    """
    mesh = programs.make_mesh(topology, case.mesh_shape)
    lower = programs.lower_decode if case.num_new else programs.lower_train
    compiled = compile_program(lower(case, mesh), topology)
    return report(case, topology, compiled)


def search(case: programs.Case, topology: chips.Topology) -> dict[str, Any]:
    """The best plan that fits: the largest batch at once, and of it the leanest remat, by MFU bound.

    A batch that is too large is halved into parts whose gradients add up to the same step, so what the
    optimizer sees stays. Cases that keep more for the backward pass than a chip holds are not compiled. The
    last plan, which does not fit, is given where none does.

    Raises:
        UserError: as `make_plan`.
    """
    tried: list[dict[str, Any]] = []
    shards = case.mesh_shape[0] * case.mesh_shape[1]
    parts, leaner = case.num_parts, list(REMAT)
    # More parts cost more exchanges: they are worth it for a leaner remat than what fits already.
    while case.batch_size % (parts * shards) == 0 and leaner:
        for remat in leaner:
            model = dataclasses.replace(
                case.model, decoder=dataclasses.replace(case.model.decoder, remat=remat)
            )
            candidate = dataclasses.replace(case, model=model, num_parts=parts)
            if traffic.kept_bytes(candidate) > programs.hbm_bytes(topology):
                continue
            progress.say(f"plan: {remat} remat, {case.batch_size // parts} rows at once")
            tried.append(make_plan(candidate, topology))
            if tried[-1]["fits"]:
                leaner = leaner[: leaner.index(remat)]
                break
        parts *= 2
    if not tried:
        return make_plan(case, topology)
    best = max((p for p in tried if p["fits"]), key=lambda p: p["mfu_bound"], default=tried[-1])
    keys = ("batch_size", "num_parts", "remat", "fits", "peak_bytes", "mfu_bound")
    return best | {"tried": [{key: plan[key] for key in keys} for plan in tried]}


def report(case: programs.Case, topology: chips.Topology, compiled: Compiled) -> dict[str, Any]:
    """A plan as plain values; see `make_plan`."""
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
    """What a chip sends in a step; a decoded token bears its share of the prompt's prefill."""
    total = sum(c.sent_bytes * c.times for c in compiled.collectives)
    return total / max(case.num_new, 1)


def _bytes_by_kind(compiled: Compiled) -> dict[str, float]:
    return {
        kind: sum(c.sent_bytes * c.times for c in compiled.collectives if c.kind == kind)
        for kind in hlo.KINDS
    }


def compile_program(lowered: jax.stages.Lowered, topology: chips.Topology) -> Compiled:
    """What the compiler says of a program; one that it refuses for memory does not fit."""
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = programs.read_refusal(str(error))
        if found is None:
            raise
        return Compiled(False, *found)
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
