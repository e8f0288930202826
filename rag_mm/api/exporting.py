"""Public checkpoints made of runs: imported ones go back bit for bit, those trained here where it fits."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from rag_mm.api import importing
from rag_mm.convert import cm3_format, shards, table, weights
from rag_mm.core import files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import public_text
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.stages.shared import frozen, train_tokenizer
from rag_mm.train import checkpoint

FAMILIES = importing.FAMILIES | {"cm3": cm3_format.FAMILY}
NAMES = "names.json"


class TensorSource(Protocol):
    """A model's parameters, a piece at a time."""

    def dtype(self, piece: table.Piece) -> np.dtype:
        """What the piece is stored as."""

    def read(self, piece: table.Piece) -> np.ndarray:
        """The piece as its tensor outside."""


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Our own file, read as it is asked for."""

    specs: Mapping[str, shards.Spec]

    def dtype(self, piece: table.Piece) -> np.dtype:
        """See `Source`."""
        return shards.DTYPES[self.specs[piece.ours].dtype]

    def read(self, piece: table.Piece) -> np.ndarray:
        """See `Source`."""
        return weights.read_piece(self.specs, piece)


@dataclasses.dataclass(frozen=True)
class TreeSource:
    """Parameters in memory, from a checkpoint of training; float32."""

    arrays: Mapping[str, Any]

    def dtype(self, piece: table.Piece) -> np.dtype:
        """See `Source`."""
        return np.dtype(self.arrays[piece.ours].dtype)

    def read(self, piece: table.Piece) -> np.ndarray:
        """See `Source`."""
        array = self.arrays[piece.ours]
        return piece.form.save(np.asarray(array if piece.layer is None else array[piece.layer]))


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """What is to be written: our config, the weights, config.json and the files beside it."""

    config: Any
    source: TensorSource
    values: Mapping[str, Any]
    side_files: Mapping[str, bytes]
    is_verbatim: bool = False  # `values` are the checkpoint's own


def export_checkpoint(
    name: str,
    workdir: pathlib.Path,
    out: pathlib.Path,
    max_bytes: int,
    dtype: np.dtype | None = None,
) -> dict[str, Any]:
    """Writes a run's model as a checkpoint of the family, whole or not at all.

    Args:
        name: llama, chameleon, clip, or cm3: a decoder trained here under its own names.
        workdir: an imported run, or one trained here whose model is of the family.
        out: a new folder.
        max_bytes: of one file of weights.
        dtype: what to write; None keeps what the run has, bit for bit.

    Returns:
        family, out, files, tensors, bytes, dtypes.

    Raises:
        UserError: the run has no such model, `out` is in the way, or the disk is too small.
    """
    if name not in FAMILIES:
        raise UserError(f"There is no family {name!r}; there are {', '.join(FAMILIES)}.")
    model, family = open_model(name, workdir), FAMILIES[name]
    pieces = family.pieces(model.config)
    dtype_of = lambda piece: dtype or model.source.dtype(piece)
    total = sum(math.prod(piece.shape) * dtype_of(piece).itemsize for piece in pieces)
    dtypes = sorted({dtype_of(piece).name for piece in pieces})
    values = dict(model.values)
    if dtype is not None or not model.is_verbatim:
        values.pop("torch_dtype", None)
        values["dtype"] = dtypes[0]
    files.check_room(out, total)
    with files.whole_folder(out) as folder, importing.megabytes("export", total) as tell:
        written = weights.write_shards(folder, pieces, dtype_of, model.source.read, max_bytes, tell)
        for path, data in model.side_files.items():
            files.write_atomic(folder / path, data)
        files.write_json(folder / frozen.CONFIG, values)
    return {
        "family": name,
        "out": str(out),
        "files": written,
        "tensors": len(pieces),
        "bytes": total,
        "dtypes": dtypes,
    }


def open_model(name: str, workdir: pathlib.Path) -> ExportedModel:
    """The model of a run that is, or can be said to be, of a family.

    Raises:
        UserError: the run has none, or it computes something else.
    """
    run = run_folder.open_run(workdir)
    imported = run.config.get(importing.IMPORTED)
    if imported is not None and imported != name:
        raise UserError(f"{workdir} holds a {imported} checkpoint, which is no {name}.")
    if imported is not None:
        return _imported(run, FAMILIES[name])
    return _trained_clip(run) if name == "clip" else _trained_decoder(run, FAMILIES[name])


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
    )


def _trained_clip(run: run_folder.Run) -> ExportedModel:
    folder = run.finished_stage("retriever") / importing.FOLDER
    family = FAMILIES["clip"]
    config = importing.load_config(family, folder)
    specs = shards.read_header(folder / frozen.PARAMS)
    values = family.write_config(config)
    size = {"shortest_edge": config.image_size}
    crop = {"height": config.image_size, "width": config.image_size}
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": size,
        "crop_size": crop,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }
    side = {
        "preprocessor_config.json": _json(preprocessor),
        frozen.VOCABULARY: (folder / frozen.VOCABULARY).read_bytes(),
    }
    return ExportedModel(config, FileSource(specs), values, side)


def _trained_decoder(run: run_folder.Run, family: table.Family) -> ExportedModel:
    stage_dir = run.finished_stage("decoder")
    record = files.read_json(stage_dir / "decoder.json")
    config = DecoderConfig(**record["model"]["decoder"])
    if family.config_class is not DecoderConfig:
        raise UserError(
            f"{run.workdir} cannot be a {family.name}: that has an image tokenizer inside, and a "
            "vocabulary map. Export it as cm3."
        )
    values = family.write_config(config)
    image_tokenizer = train_tokenizer.load_tokenizer(run.workdir)
    arrays = checkpoint.load_params(stage_dir / "params", family.describe(config)[1])
    text = image_tokenizer.vocabulary.tokenizer.to_str().encode()
    folder = run.finished_stage("tokenizer") / importing.FOLDER
    side = {
        public_text.TOKENIZER: text,
        frozen.VOCABULARY: (folder / frozen.VOCABULARY).read_bytes(),
        NAMES: _json(cm3_format.name_table(config)),
    }
    if family is not FAMILIES["cm3"]:
        del side[NAMES]
        values |= {
            "bos_token_id": image_tokenizer.vocabulary.eod,
            "eos_token_id": image_tokenizer.vocabulary.eod,
        }
    return ExportedModel(config, TreeSource(table.named(arrays)), values, side)


def _json(value: Any) -> bytes:
    return (files.canonical_json(value) + "\n").encode()
