"""Models that a stage takes from a folder in place of training its own.

The stage's result is a copy, so that the run needs the folder no more to be loaded, moved or exported.
"""

import dataclasses
import os
from collections.abc import Callable, Collection
from typing import Any

from etils import epath

from rag_mm.core import files, manifest_values, renames, run_folder
from rag_mm.core.errors import UserError
from rag_mm.data import public_text, vocabulary
from rag_mm.stages.shared import frozen

FOLDER = "frozen"  # Where a stage keeps its frozen model.
_OTHER_MAKERS = {"tokenizer": ("spae",)}  # Stages whose folder holds a model of the same kind.


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenConfig:
    """What a stage takes from a folder in place of making its own.

    Attributes:
        folder: where it lies; None makes one here.
        folder_fingerprint: fingerprint of what lies there. It is computed, so that other content is another
            config.
    """

    folder: str | None = dataclasses.field(default=None, metadata=manifest_values.ADDED_LATER)
    folder_fingerprint: str = dataclasses.field(
        init=False, default="", metadata=manifest_values.ADDED_LATER
    )

    def identify(self, fingerprint_of: Callable[[str], str]) -> None:
        """Sets `folder_fingerprint` if there is a folder; for `__post_init__`.

        Raises:
            UserError: `fingerprint_of` raises one; the folder is named.
        """
        if self.folder is None:
            return
        try:
            found = fingerprint_of(self.folder)
        except UserError as error:
            raise UserError(f"folder={self.folder} cannot be used: {error}") from None
        object.__setattr__(self, "folder_fingerprint", found)

    def check_unchanged(self, fingerprint: str) -> None:
        """Raises UserError if the fingerprint of what was taken is not that of the config."""
        if fingerprint != self.folder_fingerprint:
            raise UserError(
                f"The content of {self.folder} changed while it was read; run the command again."
            )


def check_outside(config: Any, run: run_folder.Run, stage: str) -> None:
    """Raises UserError if a config takes something from its own stage, which is deleted to be rebuilt."""
    workdir, own = (os.path.realpath(path) for path in (run.workdir, run.stage_dir(stage)))
    for part in (config, *vars(config).values()):
        if not isinstance(part, GivenConfig) or part.folder is None:
            continue
        place = os.path.realpath(part.folder)
        if place == workdir or os.path.commonpath((place, own)) == own:
            raise UserError(
                f"{stage}: folder={part.folder} is what the stage would replace; give another --workdir."
            )


def find_model(path: epath.PathLike, stage: str) -> epath.Path:
    """The folder of a frozen model: `path` itself, as in a memory, or that of a run or of its stage.

    Raises:
        UserError: there is none, or its stage is unfinished or edited.
    """
    path = epath.Path(path)
    if (path / frozen.CONFIG).exists() and (path / frozen.PARAMS).exists():
        return path
    is_maker = path.name in (stage, *_OTHER_MAKERS.get(stage, ()))
    if is_maker and (path / run_folder.MANIFEST).exists():
        return run_folder.Run(path.parent).finished_stage(path.name) / FOLDER
    return run_folder.open_run(path).finished_stage(stage) / FOLDER


def model_fingerprint(path: epath.PathLike, stage: str, families: Collection[str]) -> str:
    """The fingerprint of the model that `find_model` finds.

    Raises:
        UserError: there is none, or it is of another family.
    """
    found = find_model(path, stage)
    frozen.read_config(found, families)
    return frozen.fingerprint(found)


def copy_model(source: epath.Path, target: epath.Path) -> None:
    """Copies the folder of a frozen model file by file, but for hidden ones, which no fingerprint counts."""
    for entry in source.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            copy_model(entry, target / entry.name)
        else:
            files.write_atomic(target / entry.name, files.read_bytes(entry))


def copy_tokenizer(
    source: epath.Path,
    target: epath.Path,
    config: frozen.ImageTokenizerConfig,
    text_vocabulary: vocabulary.Vocabulary,
) -> None:
    """Copies the folder of an image tokenizer, for images of `config`'s size and another vocabulary."""
    family, _ = frozen.read_tokenizer_config(source)
    for name in (frozen.PARAMS, frozen.WORDS):
        if (source / name).exists():
            files.write_atomic(target / name, files.read_bytes(source / name))
    if (source / frozen.GUIDE).exists():
        copy_model(source / frozen.GUIDE, target / frozen.GUIDE)
    text_vocabulary.save(target / frozen.VOCABULARY)
    values = {"family": family, **dataclasses.asdict(config)}
    files.write_json(target / frozen.CONFIG, renames.to_stored(values))


def find_text(path: epath.PathLike) -> epath.Path:
    """The file of a text tokenizer: in `path` itself, or in the image tokenizer of a run.

    Raises:
        UserError: there is none.
    """
    path = epath.Path(path)
    own = [path / name for name in (frozen.VOCABULARY, public_text.TOKENIZER)]
    for file in (*own, *([path] if path.is_file() else [])):
        if file.exists():
            return file
    found = find_model(path, "tokenizer") / frozen.VOCABULARY
    if not found.exists():
        raise UserError(
            f"{path} has no text tokenizer; give a folder with {frozen.VOCABULARY} or "
            f"{public_text.TOKENIZER}, or a run that has trained one."
        )
    return found


def text_fingerprint(path: epath.PathLike) -> str:
    """The digest of the file that `find_text` finds.

    Raises:
        UserError: there is none, or it is not supported.
    """
    found = find_text(path)
    vocabulary.read_text_tokenizer(found)
    return files.file_digest(found)
