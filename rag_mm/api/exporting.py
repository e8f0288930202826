"""Runs to public checkpoints: imported runs bitwise, trained runs if the family has their architecture."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from rag_mm.api import emu_painter, importing, model_card
from rag_mm.convert import clip_format, cm3_format, shards, siglip2_format, table, weights
from rag_mm.core import files, renames, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import public_text, vocabulary
from rag_mm.nn import param_trees
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.stages.emu import emu_text, saved_emu, tuned_emu
from rag_mm.stages.ra_cm3 import decoder_record
from rag_mm.stages.shared import frozen, train_tokenizer
from rag_mm.train import checkpoint

FAMILIES = importing.FAMILIES
EMU_STAGES = ("emu", "emu_sft")  # Of a run of Emu, whose decoders can be exported.


class TensorSource(Protocol):
    """Where a model's parameters are read from, one tensor at a time."""

    def dtype(self, mapping: table.TensorMapping) -> np.dtype:
        """The dtype in which the mapping's tensor is stored."""

    def read(self, mapping: table.TensorMapping) -> np.ndarray:
        """The tensor under its public name and in its public layout."""


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Parameters of a run's weight file, read on demand."""

    specs: Mapping[str, shards.TensorSpec]

    def dtype(self, mapping: table.TensorMapping) -> np.dtype:
        """See `TensorSource`."""
        return shards.DTYPES[self.specs[mapping.ours].dtype]

    def read(self, mapping: table.TensorMapping) -> np.ndarray:
        """See `TensorSource`."""
        return weights.read_mapped(self.specs, mapping)


@dataclasses.dataclass(frozen=True)
class TreeSource:
    """Parameters in host memory, such as from a training checkpoint; float32."""

    arrays: Mapping[str, Any]

    def dtype(self, mapping: table.TensorMapping) -> np.dtype:
        """See `TensorSource`."""
        return np.dtype(self.arrays[mapping.ours].dtype)

    def read(self, mapping: table.TensorMapping) -> np.ndarray:
        """See `TensorSource`."""
        array = self.arrays[mapping.ours]
        return mapping.transform.save(
            np.asarray(array if mapping.layer is None else array[mapping.layer])
        )


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A model to export: its config here, its weights, its config.json and its other files.

    `parts` is the folder of an Emu's visual decoder, if it has one.
    """

    config: Any
    source: TensorSource
    values: Mapping[str, Any]
    side_files: Mapping[str, bytes]
    is_verbatim: bool = (
        False  # whether `values` are the imported checkpoint's config.json, unchanged
    )
    parts: pathlib.Path | None = None


def export_checkpoint(
    name: str,
    workdir: pathlib.Path,
    out: pathlib.Path,
    max_bytes: int,
    dtype: np.dtype | None = None,
    card_license: str | None = None,
    stage: str = decoder_record.STAGE,
) -> dict[str, Any]:
    """Writes a run's model as a checkpoint of the family; on failure nothing is left in `out`.

    Args:
        name: llama, chameleon, clip, siglip2 or emu; or cm3, a trained decoder under its own tensor names.
        workdir: an imported run, or a trained one whose model has the family's architecture.
        out: new folder.
        max_bytes: maximum size of one weight file.
        dtype: dtype to write; None keeps the stored one, bitwise identical.
        card_license: writes a model card that states this license of the weights, such as apache-2.0 or
            `model_card.UNKNOWN`; None writes no card.
        stage: of a trained run, the stage whose decoder is exported, such as `sft`; of one of Emu, `emu`, or
            `emu_sft` for the tuned one, whose updates are merged.

    Returns:
        family, out, files, tensors, bytes, dtypes.

    Raises:
        UserError: the run has no such model, `out` exists, or the disk has too little space.
    """
    if name not in FAMILIES:
        raise UserError(f"There is no family {name!r}; the families are {', '.join(FAMILIES)}.")
    model, family = open_model(name, workdir, stage), FAMILIES[name]
    mappings = family.mappings(model.config)
    dtype_of = lambda mapping: dtype or model.source.dtype(mapping)
    total = sum(math.prod(mapping.shape) * dtype_of(mapping).itemsize for mapping in mappings)
    dtypes = sorted({dtype_of(mapping).name for mapping in mappings})
    values = dict(model.values)
    if dtype is not None or not model.is_verbatim:
        values.pop("torch_dtype", None)
        values["dtype"] = dtypes[0]
    side = dict(model.side_files)
    if card_license is not None:
        num_params = sum(math.prod(mapping.shape) for mapping in mappings)
        exported = model_card.Weights(num_params, dtypes, model.config, stage)
        text = model_card.make(name, run_folder.open_run(workdir), exported, card_license)
        side[model_card.FILE_NAME] = text.encode()
    files.check_room(out, total)
    with files.whole_folder(out) as folder, importing.megabytes("export", total) as update:
        written = weights.write_shards(
            folder, mappings, dtype_of, model.source.read, max_bytes, update
        )
        if model.parts is not None:
            emu_painter.export_parts(model.parts, folder, dtype)
        for path, data in side.items():
            files.write_atomic(folder / path, data)
        files.write_json(folder / frozen.CONFIG, values)
    return {
        "family": name,
        "out": str(out),
        "files": written,
        "tensors": len(mappings),
        "bytes": total,
        "dtypes": dtypes,
    }


def open_model(
    name: str, workdir: pathlib.Path, stage: str = decoder_record.STAGE
) -> ExportedModel:
    """The model of a run, if it is of the family or has the family's architecture.

    Raises:
        UserError: the run has no such model, its architecture differs, or a stage is named for a model that
            is no decoder.
    """
    run = run_folder.open_run(workdir)
    imported = run.config.get(importing.IMPORTED)
    if imported is not None and imported != name:
        raise UserError(f"{workdir} holds a {imported} checkpoint, not {name}.")
    is_encoder = name in frozen.RETRIEVERS
    if stage != decoder_record.STAGE and (imported is not None or is_encoder):
        raise UserError(
            f"The stage {stage!r} is for trained decoders, but {name} of {workdir} is none; leave it out."
        )
    if imported is not None:
        return _imported(run, FAMILIES[name])
    if is_encoder:
        return _retriever(run, FAMILIES[name])
    family = FAMILIES[name]
    if stage in EMU_STAGES:
        return _emus_decoder(run, family, stage)
    return _trained_decoder(run, family, stage)


def _imported(run: run_folder.Run, family: table.Family) -> ExportedModel:
    stage_dir = run.finished_stage(importing.STAGES[family.name])
    folder, source = stage_dir / importing.FOLDER, stage_dir / importing.SOURCE
    side = {p.name: p.read_bytes() for p in source.iterdir() if p.name != frozen.CONFIG}
    return ExportedModel(
        config=importing.load_config(family, folder),
        source=FileSource(shards.read_header(folder / frozen.PARAMS)),
        values=files.read_json(source / frozen.CONFIG),
        side_files=side,
        is_verbatim=True,
        parts=pathlib.Path(folder) if family.name == "emu" else None,
    )


def _retriever(run: run_folder.Run, family: table.Family) -> ExportedModel:
    """The retriever of a trained run, which it trained or was given."""
    folder = run.finished_stage("retriever") / importing.FOLDER
    config = importing.load_config(family, folder)
    specs = shards.read_header(folder / frozen.PARAMS)
    values = family.write_config(config)
    format_of = siglip2_format if family is siglip2_format.FAMILY else clip_format
    # The text tokenizer: our own or, of a public model that the run was given, the public one.
    names = (frozen.VOCABULARY, *public_text.FILES)
    side = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    side["preprocessor_config.json"] = _json(format_of.write_preprocessor(config))
    return ExportedModel(config, FileSource(specs), values, side)


def _trained_decoder(run: run_folder.Run, family: table.Family, stage: str) -> ExportedModel:
    stage_dir = decoder_record.find_folder(run, stage)
    record = files.read_object(stage_dir / decoder_record.FILE, model=dict)
    config = DecoderConfig(**renames.from_stored(record["model"]["decoder"]))
    _check_decoder(run, family)
    values = family.write_config(config)
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    arrays = checkpoint.load_params(stage_dir / "params", family.describe(config)[1])
    text = image_tokenizer.vocabulary.tokenizer.to_str().encode()
    folder = run.finished_stage("tokenizer") / importing.FOLDER
    side = {
        public_text.TOKENIZER: text,
        frozen.VOCABULARY: (folder / frozen.VOCABULARY).read_bytes(),
        cm3_format.NAMES: _json(cm3_format.name_table(config)),
    }
    if family is not FAMILIES["cm3"]:
        del side[cm3_format.NAMES]
        values |= {
            "bos_token_id": image_tokenizer.vocabulary.eod,
            "eos_token_id": image_tokenizer.vocabulary.eod,
        }
    return ExportedModel(config, TreeSource(param_trees.leaves_by_path(arrays)), values, side)


def _emus_decoder(run: run_folder.Run, family: table.Family, stage: str) -> ExportedModel:
    """The decoder of a run of Emu without its image tower; of a tuned one the updates are merged."""
    _check_decoder(run, family)
    folder = run.finished_stage(EMU_STAGES[0])
    emu = saved_emu.load(folder)
    if stage != EMU_STAGES[0]:
        emu = tuned_emu.load(run.finished_stage(stage), emu).emu
    config, ids, text = emu.config.decoder, emu.config.ids, emu.vocabulary
    own = text.public if isinstance(text, emu_text.ImportedText) else text
    assert isinstance(own, public_text.PublicTokenizer | vocabulary.Vocabulary)
    values = family.write_config(config)
    side = {
        public_text.TOKENIZER: own.tokenizer.to_str().encode(),
        frozen.VOCABULARY: (folder / saved_emu.VOCABULARY).read_bytes(),
    }
    if family is FAMILIES["cm3"]:
        side[cm3_format.NAMES] = _json(cm3_format.name_table(config))
    else:
        values |= {"bos_token_id": ids.begin, "eos_token_id": ids.end}
    arrays = param_trees.leaves_by_path(emu.model.params["decoder"])
    return ExportedModel(config, TreeSource(arrays), values, side)


def _check_decoder(run: run_folder.Run, family: table.Family) -> None:
    if family.config_class is not DecoderConfig:
        raise UserError(
            f"{run.workdir} cannot be exported as {family.name}, which has more parts than a decoder. Export "
            "it as cm3."
        )


def _json(value: Any) -> bytes:
    return (files.canonical_json(value) + "\n").encode()
