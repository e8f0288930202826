"""What the readers of public instruction data share: checked fields, and pictures inside a folder."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import caption_text, files, image_files
from rag_mm.core.errors import UserError
from rag_mm.data import captions, image_decoding, sources
from rag_mm.data.instruction_items import InstructionItem
from rag_mm.memory.writing import stream

Found = InstructionItem | stream.Reject


def attempt(name: str, make: Callable[[], InstructionItem]) -> Found:
    """The item, or the record as a reject if it is bad; `name` says which record it is."""
    try:
        return make()
    except (captions.BadRecord, image_decoding.BadImage) as error:
        return captions.BadRecord(error.reason, str(error)).as_reject(name)


def read_picture(folder: epath.Path, name: str, image_size: int) -> np.ndarray:
    """A picture of an untrusted folder, its shorter side scaled and the longer one cropped: uint8 [S, S, 3].

    Raises:
        BadRecord, BadImage: it leads outside, is missing or damaged; the message begins with the name.
    """
    return image_files.fit(read_whole_picture(folder, name), image_size)


def read_whole_picture(folder: epath.Path, name: str) -> np.ndarray:
    """A picture of an untrusted folder as it is, uint8 [H, W, 3]; raises as `read_picture` does."""
    try:
        return image_decoding.decode(*sources.read_inside(folder, name), min_pixels=2).pixels
    except (captions.BadRecord, image_decoding.BadImage) as error:
        raise captions.BadRecord(error.reason, f"{name!a} {error}") from error


def fields_of(value: Any) -> dict[str, Any]:
    """A record that must be a JSON object; BadRecord if it is none."""
    if not isinstance(value, dict):
        raise captions.BadRecord("not-json", "is not a JSON object.")
    return value


def text_of(fields: dict[str, Any], key: str) -> str:
    """A text that a record must have, cleaned by `caption_text.clean`; BadRecord without one."""
    value = fields.get(key)
    text = caption_text.clean(value) if isinstance(value, str) else ""
    if not text:
        raise captions.BadRecord("bad-field", f"has no {key}, or one that is no text.")
    if len(text) > captions.MAX_TEXT_BYTES:
        raise captions.BadRecord("too-long", f"has a {key} of {len(text):,} characters.")
    captions.check_encodable(text)
    return text


def id_of(fields: dict[str, Any], key: str) -> int:
    """A whole number that a record must have; BadRecord without one."""
    value = fields.get(key)
    if type(value) is not int:
        raise captions.BadRecord("bad-field", f"has no {key}, or one that is no whole number.")
    return value


def name_of(value: Any, kind: str, key: str, position: int) -> str:
    """What a record is called in a list of rejects: by its id, or by its place, counted from 1."""
    with contextlib.suppress(captions.BadRecord):
        return f"{kind} {id_of(fields_of(value), key)}"
    return f"{kind} number {position}"


def read_lists(path: epath.Path, *keys: str) -> dict[str, Any]:
    """A JSON object that has lists under these keys; further keys are left as they are.

    Raises:
        UserError: the file is missing or no such object.
    """
    found = files.read_json(path)
    missing = [
        key for key in keys if not isinstance(found, dict) or not isinstance(found.get(key), list)
    ]
    if missing:
        raise UserError(f"{path} has no list {missing[0]!r}; give a file in the published form.")
    return found


def find_file(path: epath.Path, *patterns: str) -> epath.Path:
    """The one file that `path` names, or that a folder has under one of some patterns.

    Raises:
        UserError: there is none, or several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a folder or one of its files.")
    found = sorted({file for pattern in patterns for file in path.glob(pattern)})
    if len(found) == 1:
        return found[0]
    wanted = " or ".join(patterns)
    if not found:
        raise UserError(f"{path} has no file {wanted}; give the folder of the published data.")
    raise UserError(f"{path} has {len(found)} files {wanted}; name one of them instead.")


def find_folder(file: epath.Path, *names: str) -> epath.Path:
    """The first folder that exists of some beside a file or, if it is in `annotations`, above it.

    Without any, the file's own folder, so that what is missing is named picture by picture.
    """
    bases = [
        file.parent,
        *([file.parent.parent] if file.parent.name.lower() == "annotations" else []),
    ]
    candidates: Iterator[epath.Path] = (base / name for base in bases for name in names)
    return next((folder for folder in candidates if folder.is_dir()), bases[-1])
