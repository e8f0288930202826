"""Builds the case to compile from a config page (configs/cm3leon.py, configs/ra_cm3.py)."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from rag_mm.core import configuration
from rag_mm.core.errors import UserError
from rag_mm.models import cm3leon, ra_cm3
from rag_mm.perf import chips, flops
from rag_mm.perf.plan import chain_sizes, decoder_programs, programs, traffic
from rag_mm.train.optimizer import OptimizerConfig

FAMILIES: dict[str, type[ra_cm3.RACM3Config]] = {
    "cm3leon": cm3leon.CM3LeonConfig,
    "ra_cm3": ra_cm3.RACM3Config,
}
# Most bytes of a chip that the float32 logits of one chunk of positions take.
LOGITS_BYTES = 1 << 29


@dataclasses.dataclass(frozen=True)
class PlanPage:
    """A page of one model at one size, to compile for a TPU topology.

    Attributes:
        family: cm3leon | ra_cm3.
        model: the decoder and its loss.
        optimizer: as published.
        num_steps: training steps, as published.
        batch_size: sequences a step.
        accumulate: parts that a step's batch is split into.
    """

    family: str
    model: ra_cm3.RACM3Config
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    num_steps: int = 1
    batch_size: int = 1
    accumulate: int = 1


def sections(page: Mapping[str, Any]) -> dict[str, configuration.Section]:
    """The dataclasses that define a page of a model's sizes.

    Raises:
        UserError: an unknown family.
    """
    from rag_mm.perf.plan import emu_programs, visual_programs  # They import this module.

    family = page.get("family")
    others = {each.FAMILY: each.sections for each in (emu_programs, visual_programs)}
    if family in others:
        return others[family](page)
    if family not in FAMILIES:
        known = ", ".join([*FAMILIES, *others])
        raise UserError(f"There is no family {family!r}; there are {known}.")
    return {
        "": configuration.Section(PlanPage, ("model", "optimizer")),
        "model": configuration.Section(FAMILIES[family]),
        "optimizer": configuration.Section(OptimizerConfig),
    }


def make_case(
    config: Mapping[str, Any],
    topology: chips.Topology,
    *,
    batch_size: int | None = None,
    num_parts: int | None = None,
    remat: str | None = None,
    mesh: str | None = None,
    num_new: int | None = None,
) -> decoder_programs.Case:
    """The page's model on a topology. None means the page's value or the default below.

    Args:
        config: values of the config page, of one model's sizes or of a chain that pretrains it.
        topology: the target.
        batch_size: sequences per step.
        num_parts: microbatches per step.
        remat: none | dots | full; default full.
        mesh: `data,fsdp,tensor`. By default fsdp is the largest number of chips of a slice that divides the
            width; for decoding, tensor is the largest one up to 8 that divides the heads.
        num_new: tokens to decode, -1 for 1,024 or half a sequence; None plans the training step.

    Raises:
        UserError: an invalid value.
    """
    config = configuration.fill(chain_sizes.model_page(config), sections)
    model = configuration.make(FAMILIES[config["family"]], config["model"], "model")
    if num_new == -1:
        num_new = min(1024, model.decoder.max_seq_len // 2)
    if num_new is not None and num_new < 1:
        raise UserError(f"--decode is {num_new}; give at least 1 token.")
    shape = _mesh_shape(model, topology, mesh, bool(num_new))
    num_sequences = batch_size or (shape[0] * shape[1] if num_new else config["batch_size"])
    parts = 1 if num_new else num_parts or config["accumulate"]
    case = decoder_programs.Case(
        model=_prepare(
            model, remat, num_sequences / (shape[0] * shape[1] * parts), shape[2], bool(num_new)
        ),
        optimizer=configuration.make(OptimizerConfig, config["optimizer"], "optimizer"),
        mesh_shape=shape,
        batch_size=num_sequences,
        num_parts=parts,
        num_new=num_new or 0,
    )
    decoder_programs.check_case(case)
    return case


def parse_mesh(mesh: str) -> tuple[int, int, int]:
    """Sizes of data, fsdp and tensor from the words of `--mesh`.

    Raises:
        UserError: they are not three sizes.
    """
    sides = mesh.split(",")
    if len(sides) != 3 or not all(side.strip().isdigit() and int(side) for side in sides):
        raise UserError(f"--mesh={mesh} is not of the form data,fsdp,tensor, such as 1,256,1.")
    data, fsdp, tensor = map(int, sides)
    return data, fsdp, tensor


def make_program(case: decoder_programs.Case, topology: chips.Topology) -> programs.Program:
    """The case as a program to compile."""
    lower = decoder_programs.lower_decode if case.num_new else decoder_programs.lower_train
    return programs.Program(
        partial(lower, case),
        case.mesh_shape,
        lambda compiled: _costs(case, topology),
        {
            "num_params": decoder_programs.count_params(case.model),
            "program": "decode" if case.num_new else "train",
            "batch_size": case.batch_size,
            "num_parts": case.num_parts,
            "seq_len": case.model.decoder.max_seq_len,
            "remat": case.model.decoder.remat,
            "loss_chunks": case.model.loss_chunks,
        },
    )


def vary(
    case: decoder_programs.Case, topology: chips.Topology, remat: str, num_parts: int
) -> programs.Program | None:
    """The program with other remat and parts; None if its activations alone exceed a chip's memory."""
    decoder = dataclasses.replace(case.model.decoder, remat=remat)
    model = dataclasses.replace(case.model, decoder=decoder)
    other = dataclasses.replace(case, model=model, num_parts=num_parts)
    if traffic.kept_bytes(other) > programs.hbm_bytes(topology):
        return None
    return make_program(other, topology)


def _costs(case: decoder_programs.Case, topology: chips.Topology) -> programs.Costs:
    config, length = case.model.decoder, case.model.decoder.max_seq_len
    hbm = traffic.hbm_bytes(case)
    if case.num_new:
        each = flops.decode_flops(config, length - case.num_new // 2)
        return programs.Costs("token", case.batch_size, each, each, hbm, 0.0, case.num_new)
    return programs.Costs(
        "token",
        case.batch_size * length,
        flops.train_flops(config, length),
        flops.hardware_flops(config, length, case.model.loss_chunks > 1),
        hbm,
        traffic.dcn_bytes(case, topology.num_slices),
    )


def _prepare(
    model: ra_cm3.RACM3Config, remat: str | None, per_chip: float, tensor: int, is_decoding: bool
) -> ra_cm3.RACM3Config:
    """Sets remat and loss chunks for `per_chip` sequences on each chip."""
    decoder = model.decoder
    if is_decoding:
        return model
    if remat is None:
        remat = decoder.remat if decoder.remat != "none" else "full"
    chunks = model.loss_chunks
    logits_bytes = 4 * per_chip * decoder.max_seq_len * decoder.vocab_size / tensor
    while logits_bytes / chunks > LOGITS_BYTES and chunks < decoder.max_seq_len:
        chunks *= 2
    return dataclasses.replace(
        model, decoder=dataclasses.replace(decoder, remat=remat), loss_chunks=chunks
    )


def _mesh_shape(
    model: ra_cm3.RACM3Config, topology: chips.Topology, mesh: str | None, is_decoding: bool
) -> tuple[int, int, int]:
    chips_per_slice = topology.num_chips // topology.num_slices
    if mesh is not None:
        return parse_mesh(mesh)
    if not is_decoding:
        width = model.decoder.embed_dim
        fsdp = max(
            n for n in range(1, chips_per_slice + 1) if not (chips_per_slice % n or width % n)
        )
        return topology.num_chips // fsdp, fsdp, 1
    # No fsdp: gathering weights for every token would cost more than the token itself.
    heads = (model.decoder.block.num_heads, model.decoder.block.num_kv_heads)
    fits = lambda n: not any(size % n for size in (*heads, chips_per_slice))
    tensor = max(n for n in (1, 2, 4, 8) if fits(n))
    return topology.num_chips // tensor, 1, tensor
