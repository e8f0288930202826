"""Runs made of public checkpoints: checked first, then converted a tensor at a time."""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from rag_mm.convert import chameleon_format, clip_format, llama_format, shards, table, weights
from rag_mm.core import configuration, files, progress, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import public_text
from rag_mm.models import chameleon
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.stages.shared import frozen

FAMILIES = {
    family.name: family
    for family in (llama_format.FAMILY, chameleon_format.FAMILY, clip_format.FAMILY)
}
# A CLIP is a retriever like one trained here, so a memory can be built with it.
STAGES = {"llama": "language_model", "chameleon": "language_model", "clip": "retriever"}
FOLDER, SOURCE = "frozen", "source"
IMPORTED = "imported"  # key of an imported run's config.json: its family
_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
# Kept as they are, for the way back; whatever is not among them belongs to other programs.
_SIDE_FILES = (
    _CONFIG,
    _PREPROCESSOR,
    "generation_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "chat_template.jinja",
    *public_text.FILES,
)


def find_family(name: str) -> table.Family:
    """The family of that name; raises UserError where there is none."""
    if name not in FAMILIES:
        raise UserError(f"There is no family {name!r}; there are {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def find_dtype(name: str | None) -> np.dtype | None:
    """A dtype by name, None for None; raises UserError where weights have no such dtype."""
    if name is None:
        return None
    known = {dtype.name: dtype for dtype in shards.NAMES}
    if name not in known:
        raise UserError(f"--dtype={name} is none of {', '.join(known)}.")
    return known[name]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that was found to be whole and of its family."""

    folder: pathlib.Path
    family: table.Family
    config: Any
    specs: Mapping[str, shards.Spec]
    pieces: list[table.Piece]
    text: public_text.PublicText | None


def open_checkpoint(name: str, folder: pathlib.Path) -> Checkpoint:
    """Reads all but the weights, and holds every tensor against the model that config.json describes.

    Raises:
        UserError: anything is missing, damaged, of another family, or beyond what is computed here.
    """
    family = find_family(name)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder with a checkpoint.")
    values = files.read_json(folder / _CONFIG)
    found = values.get("model_type") if isinstance(values, dict) else None
    if found != family.name:
        raise UserError(
            f"{folder} holds a {found!r}, not a {family.name!r} (config.json: model_type)."
        )
    specs = shards.open_folder(epath.Path(folder))
    side = folder / _PREPROCESSOR
    preprocessor = files.read_json(side) if side.exists() else {}
    config = family.read_config(table.CheckpointFolder(values, preprocessor, frozenset(specs)))
    pieces = weights.check(family, config, specs)
    text = public_text.load_text(folder)
    size = config.vocab_size if name == "clip" else decoder_config(config).vocab_size
    if text is not None and text.size > size:
        raise UserError(
            f"The tokenizer in {folder} has {text.size:,} ids, the model {size:,}: another model's."
        )
    return Checkpoint(folder, family, config, specs, pieces, text)


def import_checkpoint(
    name: str, folder: pathlib.Path, out: pathlib.Path, dtype: np.dtype | None = None
) -> dict[str, Any]:
    """Makes a run of a checkpoint; nothing is written before all of it was checked.

    Args:
        name: the family.
        folder: config.json, safetensors and, if it is there, the tokenizer.
        out: the run's folder, new, or left by an import that was cut off.
        dtype: what to store; None keeps what the checkpoint has, bit for bit.

    Returns:
        family, run, tensors, bytes, dtypes, has_tokenizer.

    Raises:
        UserError: see `open_checkpoint`; or `out` is in the way, or the disk is too small.
    """
    found = open_checkpoint(name, folder)
    shapes = weights.stored_shapes(found.pieces, found.specs, dtype)
    total = weights.num_bytes(shapes)
    run = run_folder.Run(epath.Path(out))
    stage = STAGES[name]
    _check_vacant(run, out, stage, name)
    files.check_room(out, total)

    def write(run: run_folder.Run, stage_dir: epath.Path) -> dict[str, Any]:
        source, target = (pathlib.Path(stage_dir) / name for name in (SOURCE, FOLDER))
        for left in (
            source,
            target,
        ):  # by an import that was cut off, perhaps of another checkpoint
            shutil.rmtree(left, ignore_errors=True)
        _copy_side_files(folder, source, _SIDE_FILES)
        _copy_side_files(folder, target, public_text.FILES)
        described = {"family": name, **dataclasses.asdict(found.config)}
        files.write_json(target / frozen.CONFIG, described)
        with megabytes("import", total) as tell:
            path = epath.Path(target / frozen.PARAMS)
            weights.write_file(path, found.pieces, found.specs, dtype, tell)
        return {"bytes": total, "tensors": len(found.pieces)}

    with run.locked():
        run.save_config({IMPORTED: name})
        run_folder.run_stage(run, stage, {"family": name}, (), write)
    return {
        "family": name,
        "run": str(out),
        "tensors": len(found.pieces),
        "bytes": total,
        "dtypes": sorted({d.name for d, _ in shapes.values()}),
        "has_tokenizer": found.text is not None,
    }


def _check_vacant(run: run_folder.Run, out: pathlib.Path, stage: str, name: str) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out={out} is a file; name a folder.")
    is_cut_off = (out / _CONFIG).exists() and run.config == {IMPORTED: name}
    manifest = run.manifest(stage) if is_cut_off else None
    entries = [path for path in out.iterdir() if path.name != ".lock"]
    if entries and (not is_cut_off or (manifest is not None and manifest.is_done)):
        raise UserError(f"--out={out} is in the way; remove it or name another folder.")


def _copy_side_files(folder: pathlib.Path, target: pathlib.Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (folder / name).is_file():
            files.write_atomic(target / name, (folder / name).read_bytes())


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder of a language model's config."""
    return config.decoder if isinstance(config, chameleon.ChameleonConfig) else config


def load_config(family: table.Family, folder: epath.Path) -> Any:
    """Our config of a model that an import left in `folder`.

    Raises:
        UserError: it is missing, damaged or another family's.
    """
    values = files.read_json(folder / frozen.CONFIG)
    if not isinstance(values, dict) or values.pop("family", None) != family.name:
        raise UserError(f"{folder} does not hold a model of the family {family.name}.")
    return configuration.make(family.config_class, values, str(folder / frozen.CONFIG))


@contextlib.contextmanager
def megabytes(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar in megabytes, told bytes."""
    with progress.track(f"{name} (MB)", round(total / 1e6)) as bar:
        yield lambda done: bar.update(round(done / 1e6))
