"""Public checkpoints to runs: the whole checkpoint is checked, then converted one tensor at a time."""

import contextlib
import dataclasses
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from rag_mm.api import emu_painter
from rag_mm.convert import (
    chameleon_format,
    clip_format,
    cm3_format,
    emu_format,
    gguf_format,
    image_tokenizer_format,
    llama_format,
    shards,
    siglip2_format,
    table,
    weights,
)
from rag_mm.core import checks, configuration, files, progress, renames, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import public_text
from rag_mm.models import chameleon, siglip2
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.stages.shared import frozen

FAMILIES = {
    family.name: family
    for family in (
        llama_format.FAMILY,
        chameleon_format.FAMILY,
        clip_format.FAMILY,
        emu_format.FAMILY,
        cm3_format.FAMILY,
        siglip2_format.FAMILY,
    )
}
GGUF = "gguf"  # a file format: the imported run is of the family llama, see `import_gguf`
IMAGE_TOKENIZER = "image-tokenizer"  # imported from a model of several families, see `convert`
# An imported CLIP or SigLIP 2 becomes the stage `retriever`, so that a memory can be built with it; an image
# tokenizer likewise becomes the stage `tokenizer`.
STAGES = {
    "llama": "language_model",
    "chameleon": "language_model",
    "emu": "language_model",
    "cm3": "language_model",
    "clip": "retriever",
    "siglip2": "retriever",
    IMAGE_TOKENIZER: "tokenizer",
}
FOLDER, SOURCE = "frozen", "source"
IMPORTED = "imported"  # key of an imported run's config.json: its family
_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_PROCESSOR, _GENERATION = "processor_config.json", "generation_config.json"
_TOKENIZER = "tokenizer_config.json"
# Copied unchanged, for the export; other files belong to other programs.
_SIDE_FILES = (
    _CONFIG,
    _PREPROCESSOR,
    _GENERATION,
    _PROCESSOR,
    "special_tokens_map.json",
    _TOKENIZER,
    "tokenizer.model",
    "chat_template.jinja",
    *public_text.FILES,
    # Of a decoder trained here.
    cm3_format.NAMES,
    frozen.VOCABULARY,
)


def find_family(name: str) -> table.Family:
    """The family of that name; raises UserError if there is none."""
    if name not in FAMILIES:
        known = ", ".join([*FAMILIES, IMAGE_TOKENIZER, GGUF])
        raise UserError(f"There is no family {name!r}; the families are {known}.")
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
    """A checkpoint folder that passed all checks of its family.

    Attributes:
        folder: where it is.
        family: of the model in it that is imported.
        config: of that model.
        specs: that model's tensors by name.
        mappings: from them to our parameters.
        text: its text tokenizer, if it has one.
        token_ids: the token of each code of an image tokenizer; empty if codes are no tokens of a text.
    """

    folder: pathlib.Path
    family: table.Family
    config: Any
    specs: Mapping[str, shards.TensorSpec]
    mappings: list[table.TensorMapping]
    text: public_text.PublicTokenizer | None
    token_ids: tuple[int, ...] = ()


def open_checkpoint(
    name: str, folder: pathlib.Path, specs: table.Specs | None = None
) -> Checkpoint:
    """Reads everything but the weights, and checks every tensor's name, shape and dtype against config.json.

    Args:
        name: the family.
        folder: the checkpoint.
        specs: its tensors, if they are not in the folder's safetensors.

    Raises:
        UserError: anything is missing, damaged, of another family, or not supported.
    """
    if name == IMAGE_TOKENIZER:
        return _open_image_tokenizer(folder)
    family = find_family(name)
    _check_folder(folder)
    values = files.read_object(folder / _CONFIG)
    model_type = values.get("model_type")
    if model_type not in (family.model_types or (family.name,)):
        raise UserError(
            f"{folder} holds a {model_type!r} checkpoint, not {family.name!r} (config.json: model_type)."
        )
    specs = shards.open_folder(epath.Path(folder)) if specs is None else specs
    config = family.read_config(table.CheckpointFolder(values, *_read_preprocessor(folder), specs))
    specs = family.rename(config, specs)
    mappings = weights.check_tensors(family, config, specs)
    read_stop_tokens(epath.Path(folder))
    text = public_text.load_tokenizer(folder)
    if isinstance(config, siglip2.SigLIP2Config) and text is not None:
        config = _with_padding(config, folder, text)
    is_encoder = name in frozen.RETRIEVERS
    vocab_size = config.vocab_size if is_encoder else decoder_config(config).vocab_size
    if text is not None and text.size > vocab_size:
        raise UserError(
            f"The tokenizer in {folder} has {text.size:,} ids but the model only {vocab_size:,}; it belongs "
            "to another model."
        )
    return Checkpoint(folder, family, config, specs, mappings, text)


def _with_padding(
    config: siglip2.SigLIP2Config, folder: pathlib.Path, text: public_text.PublicTokenizer
) -> siglip2.SigLIP2Config:
    """The config with the id of the tokenizer's padding, which stands at the right of texts."""
    path = folder / _TOKENIZER
    values = files.read_object(path) if path.exists() else {}
    r = table.ConfigReader(values, _TOKENIZER)
    if str(values.get("tokenizer_class")).startswith("SiglipTokenizer"):
        raise UserError(
            f"{folder} has the tokenizer of SigLIP 1, which drops punctuation; import a SigLIP 2, or remove "
            f"{public_text.TOKENIZER} to embed images alone."
        )
    r.require("padding_side", "right", "right")
    token = values.get("pad_token", "<pad>")
    token = token.get("content") if isinstance(token, dict) else token
    found = text.tokenizer.token_to_id(token) if isinstance(token, str) else None
    if found is None or found >= config.vocab_size:
        raise UserError(f"{path}: the pad_token {str(token)[:40]!r} is no token of the tokenizer.")
    return dataclasses.replace(config, padding=found)


def _open_image_tokenizer(folder: pathlib.Path) -> Checkpoint:
    _check_folder(folder)
    values, specs = files.read_object(folder / _CONFIG), shards.open_folder(epath.Path(folder))
    checkpoint = table.CheckpointFolder(values, *_read_preprocessor(folder), specs)
    family, specs, token_ids = image_tokenizer_format.find(checkpoint)
    config = family.read_config(checkpoint)
    if token_ids and len(token_ids) != config.codebook_size:
        raise UserError(
            f"config.json: there are {len(token_ids)} image tokens for {config.codebook_size} codes."
        )
    mappings = weights.check_tensors(family, config, specs)
    return Checkpoint(folder, family, config, specs, mappings, None, token_ids)


def read_stop_tokens(folder: epath.Path) -> tuple[int, ...]:
    """The ids that end a language model's text; none if no file tells.

    Raises:
        UserError: they are no integers from 0.
    """
    # generation_config.json, if present, also lists end-of-turn tokens, which config.json does not.
    for name in (_GENERATION, _CONFIG):
        values = files.read_object(folder / name) if (folder / name).exists() else {}
        eos = values.get("eos_token_id")
        if eos is None:
            continue
        ids = tuple(eos) if isinstance(eos, list) else (eos,)
        if len(ids) > checks.MAX_LENGTH or any(
            type(each) is not int or not 0 <= each <= checks.MAX_SIZE for each in ids
        ):
            raise UserError(f"{folder / name}: eos_token_id is {str(eos)[:40]}; give ids from 0.")
        return ids
    return ()


def _check_folder(folder: pathlib.Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that holds a checkpoint.")


def _read_preprocessor(folder: pathlib.Path) -> tuple[Any, str]:
    """Settings of the image processor and their file; like transformers, a nested table takes precedence."""
    for name in (_PROCESSOR, _PREPROCESSOR):
        values = files.read_json(folder / name) if (folder / name).exists() else None
        if name == _PROCESSOR and isinstance(values, dict):
            values = values.get("image_processor")
        if values is not None:
            return values, name
    return {}, _PREPROCESSOR


def import_checkpoint(
    name: str,
    folder: pathlib.Path,
    out: pathlib.Path,
    dtype: np.dtype | None = None,
    specs: table.Specs | None = None,
) -> dict[str, Any]:
    """Converts a checkpoint into a run; nothing is written before the whole checkpoint was checked.

    Args:
        name: the family: clip, siglip2, llama, chameleon, emu, cm3 or image-tokenizer.
        folder: folder with config.json, safetensors and, optionally, the tokenizer.
        out: the run folder; new, or left by an interrupted import of the same family.
        dtype: dtype to store; None keeps the checkpoint's, bitwise identical.
        specs: the checkpoint's tensors, if they are not in the folder's safetensors.

    Returns:
        family, run, tensors, bytes, dtypes, has_tokenizer.

    Raises:
        UserError: see `open_checkpoint`; or `out` already exists, or the disk has too little space.
    """
    checkpoint = open_checkpoint(name, folder, specs)
    shapes = weights.stored_shapes(checkpoint.mappings, checkpoint.specs, dtype)
    parts = emu_painter.open_parts(folder, checkpoint.config) if name == "emu" else {}
    total = weights.num_bytes(shapes) + sum(part.num_bytes(dtype) for part in parts.values())
    run = run_folder.Run(epath.Path(out))
    num_tensors = len(checkpoint.mappings) + sum(len(each.mappings) for each in parts.values())
    stage = STAGES[name]
    _check_vacant(run, out, stage, name)
    files.check_room(out, total)

    def write(run: run_folder.Run, stage_dir: epath.Path) -> dict[str, Any]:
        source, target = (pathlib.Path(stage_dir) / name for name in (SOURCE, FOLDER))
        for leftover in (source, target):  # of an interrupted import, perhaps of another checkpoint
            shutil.rmtree(leftover, ignore_errors=True)
        _copy_side_files(folder, source, _SIDE_FILES)
        if name != IMAGE_TOKENIZER:
            _copy_side_files(folder, target, public_text.FILES)
        model_config = {"family": checkpoint.family.name, **dataclasses.asdict(checkpoint.config)}
        files.write_json(target / frozen.CONFIG, renames.to_stored(model_config))
        if checkpoint.token_ids:
            files.write_json(target / frozen.TOKEN_IDS, {"token_ids": checkpoint.token_ids})
        with megabytes("import", total) as update:
            path = epath.Path(target / frozen.PARAMS)
            weights.write_file(path, checkpoint.mappings, checkpoint.specs, dtype, update)
            emu_painter.write_parts(parts, target, dtype)
        return {"bytes": total, "tensors": num_tensors}

    with run.locked():
        run.save_config({IMPORTED: name})
        run_folder.run_stage(run, stage, {"family": name}, (), write)
    return {
        "family": name,
        "run": str(out),
        "tensors": num_tensors,
        "bytes": total,
        "dtypes": sorted({d.name for d, _ in shapes.values()}),
        "has_tokenizer": checkpoint.text is not None,
    }


def import_gguf(
    file: pathlib.Path, out: pathlib.Path, dtype: np.dtype | None = None
) -> dict[str, Any]:
    """Converts a GGUF file of a LLaMA into a run of the family llama; quantized weights become float32.

    Args:
        file: the GGUF file.
        out, dtype: as for `import_checkpoint`; None stores float32, whatever the file's types are.

    Returns:
        As `import_checkpoint`.

    Raises:
        UserError: see `gguf_format.open_file` and `import_checkpoint`.
    """
    checkpoint = gguf_format.open_file(file)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(
            name
        )  # The checkpoint's small files; its tensors stay where they are.
        files.write_json(folder / _CONFIG, checkpoint.config)
        for name, text in checkpoint.texts.items():
            files.write_atomic(folder / name, text.encode())
        return import_checkpoint("llama", folder, out, dtype, checkpoint.specs)


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
    has_decoder = isinstance(config, chameleon.ChameleonConfig | EmuConfig)
    return config.decoder if has_decoder else config


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
