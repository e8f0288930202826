"""From a page of one model's sizes (configs/cm3leon.py, configs/ra_cm3.py) to a case to compile."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rag_mm.core import configuration
from rag_mm.core.errors import UserError
from rag_mm.models import cm3leon, ra_cm3
from rag_mm.perf import chips
from rag_mm.perf.plan import programs
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
    family = page.get("family")
    if family not in FAMILIES:
        raise UserError(f"There is no family {family!r}; there are {', '.join(FAMILIES)}.")
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
) -> programs.Case:
    """The page's model on a topology; what is None is the page's, or chosen.

    Args:
        config: the page's values.
        topology: where it runs.
        batch_size: rows of a step.
        num_parts: parts of a step's batch.
        remat: none | dots | full; full where neither says.
        mesh: `data,fsdp,tensor`; as many chips of a slice under fsdp as divide the width, or to decode
            as many as divide the heads, at most 8, under tensor.
        num_new: tokens to decode, -1 for 1,024 or half a row; None plans the training step.

    Raises:
        UserError: a value that does not fit.
    """
    config = configuration.fill(config, sections)
    model = configuration.make(FAMILIES[config["family"]], config["model"], "model")
    if num_new == -1:
        num_new = min(1024, model.decoder.max_seq_len // 2)
    if num_new is not None and num_new < 1:
        raise UserError(f"--decode is {num_new}; give at least 1 token.")
    shape = _mesh_shape(model, topology, mesh, bool(num_new))
    rows = batch_size or (shape[0] * shape[1] if num_new else config["batch_size"])
    parts = 1 if num_new else num_parts or config["accumulate"]
    case = programs.Case(
        model=_prepare(model, remat, rows / (shape[0] * shape[1] * parts), shape[2], bool(num_new)),
        optimizer=configuration.make(OptimizerConfig, config["optimizer"], "optimizer"),
        mesh_shape=shape,
        batch_size=rows,
        num_parts=parts,
        num_new=num_new or 0,
    )
    programs.check_case(case)
    return case


def _prepare(
    model: ra_cm3.RACM3Config, remat: str | None, rows: float, tensor: int, is_decoding: bool
) -> ra_cm3.RACM3Config:
    """Remat and loss chunks for so many rows a chip."""
    decoder = model.decoder
    if is_decoding:
        return model
    if remat is None:
        remat = decoder.remat if decoder.remat != "none" else "full"
    chunks = model.loss_chunks
    whole = 4 * rows * decoder.max_seq_len * decoder.vocab_size / tensor
    while whole / chunks > LOGITS_BYTES and chunks < decoder.max_seq_len:
        chunks *= 2
    return dataclasses.replace(
        model, decoder=dataclasses.replace(decoder, remat=remat), loss_chunks=chunks
    )


def _mesh_shape(
    model: ra_cm3.RACM3Config, topology: chips.Topology, mesh: str | None, is_decoding: bool
) -> tuple[int, int, int]:
    chips_a_slice = topology.num_chips // topology.num_slices
    if mesh is not None:
        sides = mesh.split(",")
        if len(sides) != 3 or not all(side.strip().isdigit() and int(side) for side in sides):
            raise UserError(f"--mesh={mesh} does not read as data,fsdp,tensor; write 1,256,1.")
        data, fsdp, tensor = map(int, sides)
        return data, fsdp, tensor
    if not is_decoding:
        width = model.decoder.embed_dim
        fsdp = max(n for n in range(1, chips_a_slice + 1) if not (chips_a_slice % n or width % n))
        return topology.num_chips // fsdp, fsdp, 1
    # Gathering weights for every token would cost more than the token.
    heads = (model.decoder.block.num_heads, model.decoder.block.num_kv_heads)
    fits = lambda n: not any(size % n for size in (*heads, chips_a_slice))
    tensor = max(n for n in (1, 2, 4, 8) if fits(n))
    return topology.num_chips // tensor, 1, tensor
