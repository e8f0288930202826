"""Public checkpoints to runs: the whole checkpoint is checked, then converted one tensor at a time."""

import contextlib
import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from rag_mm.convert import chameleon_format, clip_format, llama_format, shards, table, weights
from rag_mm.core import configuration, files, progress, renames, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import public_text
from rag_mm.models import chameleon
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.stages.shared import frozen

FAMILIES = {
    family.name: family
    for family in (llama_format.FAMILY, chameleon_format.FAMILY, clip_format.FAMILY)
}
# An imported CLIP becomes the stage `retriever`, so that a memory can be built with it.
STAGES = {"llama": "language_model", "chameleon": "language_model", "clip": "retriever"}
FOLDER, SOURCE = "frozen", "source"
IMPORTED = "imported"  # key of an imported run's config.json: its family
_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
# Copied unchanged, for the export; other files belong to other programs.
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
    """The family of that name; raises UserError if there is none."""
    if name not in FAMILIES:
        raise UserError(f"There is no family {name!r}; the families are {', '.join(FAMILIES)}.")
    return FAMILIES[name]


def find_dtype(name: str | None) -> np.dtype | None:
    """The dtype of that name, None for None; raises UserError for a dtype that weights cannot have."""
    if name is None:
        return None
    known = {dtype.name: dtype for dtype in shards.DTYPE_NAMES}
    if name not in known:
        raise UserError(f"--dtype={name} is not supported; give {', '.join(known)}.")
    return known[name]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that passed all checks of its family."""

    folder: pathlib.Path
    family: table.Family
    config: Any
    specs: Mapping[str, shards.TensorSpec]
    mappings: list[table.TensorMapping]
    text: public_text.PublicTokenizer | None


def open_checkpoint(name: str, folder: pathlib.Path) -> Checkpoint:
    """Reads everything but the weights, and checks every tensor's name, shape and dtype against config.json.

    Raises:
        UserError: anything is missing, damaged, of another family, or not supported.
    """
    family = find_family(name)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds a checkpoint.")
    values = files.read_json(folder / _CONFIG)
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type != family.name:
        raise UserError(
            f"{folder} holds a {model_type!r} checkpoint, not {family.name!r} (config.json: model_type)."
        )
    specs = shards.open_folder(epath.Path(folder))
    preprocessor_file = folder / _PREPROCESSOR
    preprocessor = files.read_json(preprocessor_file) if preprocessor_file.exists() else {}
    config = family.read_config(table.CheckpointFolder(values, preprocessor, frozenset(specs)))
    mappings = weights.check_tensors(family, config, specs)
    text = public_text.load_tokenizer(folder)
    vocab_size = config.vocab_size if name == "clip" else decoder_config(config).vocab_size
    if text is not None and text.size > vocab_size:
        raise UserError(
            f"The tokenizer in {folder} has {text.size:,} ids but the model only {vocab_size:,}; it belongs "
            "to another model."
        )
    return Checkpoint(folder, family, config, specs, mappings, text)


def import_checkpoint(
    name: str, folder: pathlib.Path, out: pathlib.Path, dtype: np.dtype | None = None
) -> dict[str, Any]:
    """Converts a checkpoint into a run; nothing is written before the whole checkpoint was checked.

    Args:
        name: the family: clip, llama or chameleon.
        folder: folder with config.json, safetensors and, optionally, the tokenizer.
        out: the run folder; new, or left by an interrupted import of the same family.
        dtype: dtype to store; None keeps the checkpoint's, bitwise identical.

    Returns:
        family, run, tensors, bytes, dtypes, has_tokenizer.

    Raises:
        UserError: see `open_checkpoint`; or `out` already exists, or the disk has too little space.
    """
    checkpoint = open_checkpoint(name, folder)
    shapes = weights.stored_shapes(checkpoint.mappings, checkpoint.specs, dtype)
    total = weights.num_bytes(shapes)
    run = run_folder.Run(epath.Path(out))
    stage = STAGES[name]
    _check_vacant(run, out, stage, name)
    files.check_room(out, total)

    def write(run: run_folder.Run, stage_dir: epath.Path) -> dict[str, Any]:
        source, target = (pathlib.Path(stage_dir) / name for name in (SOURCE, FOLDER))
        for leftover in (source, target):  # of an interrupted import, perhaps of another checkpoint
            shutil.rmtree(leftover, ignore_errors=True)
        _copy_side_files(folder, source, _SIDE_FILES)
        _copy_side_files(folder, target, public_text.FILES)
        model_config = {"family": name, **dataclasses.asdict(checkpoint.config)}
        files.write_json(target / frozen.CONFIG, renames.to_stored(model_config))
        with megabytes("import", total) as update:
            path = epath.Path(target / frozen.PARAMS)
            weights.write_file(path, checkpoint.mappings, checkpoint.specs, dtype, update)
        return {"bytes": total, "tensors": len(checkpoint.mappings)}

    with run.locked():
        run.save_config({IMPORTED: name})
        run_folder.run_stage(run, stage, {"family": name}, (), write)
    return {
        "family": name,
        "run": str(out),
        "tensors": len(checkpoint.mappings),
        "bytes": total,
        "dtypes": sorted({d.name for d, _ in shapes.values()}),
        "has_tokenizer": checkpoint.text is not None,
    }


def _check_vacant(run: run_folder.Run, out: pathlib.Path, stage: str, name: str) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out={out} is a file; give a folder.")
    is_interrupted = (out / _CONFIG).exists() and run.config == {IMPORTED: name}
    manifest = run.manifest(stage) if is_interrupted else None
    entries = [path for path in out.iterdir() if path.name != ".lock"]
    if entries and (not is_interrupted or (manifest is not None and manifest.is_done)):
        raise UserError(f"--out={out} already exists; remove it or choose another folder.")


def _copy_side_files(folder: pathlib.Path, target: pathlib.Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (folder / name).is_file():
            files.write_atomic(target / name, (folder / name).read_bytes())


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder's part of a language model's config."""
    return config.decoder if isinstance(config, chameleon.ChameleonConfig) else config


def load_config(family: table.Family, folder: epath.Path) -> Any:
    """The config of an imported model in `folder`, as this package's dataclass.

    Raises:
        UserError: it is missing, damaged or of another family.
    """
    values = files.read_json(folder / frozen.CONFIG)
    if not isinstance(values, dict) or values.pop("family", None) != family.name:
        raise UserError(f"{folder} does not hold a model of the family {family.name}.")
    values = renames.from_stored(values)
    return configuration.make(family.config_class, values, str(folder / frozen.CONFIG))


@contextlib.contextmanager
def megabytes(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in megabytes; yields a function that takes the number of bytes done."""
    with progress.track(f"{name} (MB)", round(total / 1e6)) as bar:
        yield lambda num_bytes: bar.update(round(num_bytes / 1e6))
