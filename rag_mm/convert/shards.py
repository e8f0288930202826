"""Safetensors files, one or many with an index: read tensor by tensor, written as they come, never whole.

The format is a length, a JSON header and raw bytes, so a tensor costs one read of its own range. Nothing here
unpickles. What a header claims is held against the file before anything is read from it.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from rag_mm.core import files
from rag_mm.core.errors import UserError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1}
_WIDTHS |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1} | {n: d.itemsize for n, d in DTYPES.items()}
_MAX_HEADER = 100 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Where a tensor lies; `dtype` is the format's own name for it."""

    path: epath.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # in the file

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * _WIDTHS[self.dtype]


def read_header(path: epath.Path) -> dict[str, Spec]:
    """The tensors of one file by name, in the order of its bytes.

    Raises:
        UserError: the file is missing, cut short, or its header contradicts it.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise UserError(f"{path} is cut short or is no safetensors file.")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        specs = [_spec(path, name, entry, 8 + length) for name, entry in header.items()]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has no readable safetensors header ({error}).") from error
    found = dict(sorted(specs, key=lambda item: (item[1].offset, item[1].nbytes)))
    end = 8 + length
    for name, spec in found.items():
        if spec.offset != end:
            raise UserError(f"{path}: tensor {name} overlaps another or leaves a gap before it.")
        end = spec.offset + spec.nbytes
    if end != size:
        state = "is cut short" if end > size else "goes on behind its last tensor"
        raise UserError(f"{path} {state}: it has {size:,} bytes, its header speaks of {end:,}.")
    return found


def _spec(path: epath.Path, name: str, entry: Mapping[str, Any], start: int) -> tuple[str, Spec]:
    shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in _WIDTHS:
        raise UserError(f"{path}: tensor {name} has dtype {entry['dtype']!r}, which is unknown.")
    if any(type(n) is not int or n < 0 for n in (*shape, first, last)):
        raise ValueError(f"tensor {name} has a size that is none")
    spec = Spec(path, entry["dtype"], shape, start + first)
    if last - first != spec.nbytes:
        raise UserError(f"{path}: tensor {name} has {last - first} bytes, not {spec.nbytes}.")
    return name, spec


def open_folder(folder: epath.Path) -> dict[str, Spec]:
    """All tensors of a checkpoint folder, file by file.

    Raises:
        UserError: no safetensors there; or an index that names an absent file, leads outside, or
            disagrees with the files.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder with a checkpoint.")
    if not (folder / INDEX).exists():
        if not (folder / FILE).exists():
            raise UserError(_nothing_here(folder))
        return read_header(folder / FILE)
    index = files.read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError(f"{folder / INDEX} has no weight_map.")
    for name, place in places.items():
        _check_place(folder, name, place)
    specs: dict[str, Spec] = {}
    for place in sorted(set(places.values())):
        found = read_header(folder / place)
        for name, spec in found.items():
            if places.get(name) != place:
                raise UserError(f"{folder / place} holds {name}, of which {INDEX} says otherwise.")
            specs[name] = spec
    for name, place in places.items():
        if name not in specs:
            raise UserError(f"{folder / place} does not hold {name}, though {INDEX} says so.")
    return specs


def _check_place(folder: epath.Path, name: str, place: Any) -> None:
    if not isinstance(place, str) or not re.fullmatch(r"[\w-][\w.-]*", place, re.ASCII):
        raise UserError(f"{INDEX} puts {name} into {place!r}, which is no plain file name.")
    if place.endswith(_PICKLES):
        raise UserError(_pickled(place))
    if not place.endswith(".safetensors"):
        raise UserError(f"{INDEX} puts {name} into {place!r}, which is no safetensors file.")
    if not (folder / place).is_file():
        raise UserError(f"{INDEX} names {place}, which is not in {folder}.")


def _nothing_here(folder: epath.Path) -> str:
    for path in sorted(folder.iterdir()):
        if path.name.endswith(_PICKLES):
            return _pickled(path.name)
    return f"{folder} holds neither {FILE} nor {INDEX}."


def _pickled(name: str) -> str:
    return (
        f"{name} is a pickle file, which can run anything when it is opened: only safetensors are "
        "read. Save the model anew with its own library (save_pretrained writes safetensors)."
    )


def read(spec: Spec) -> np.ndarray:
    """A tensor as a new array.

    Raises:
        UserError: its dtype is none of float32, float16 and bfloat16, or the file got shorter.
    """
    if spec.dtype not in DTYPES:
        raise UserError(f"{spec.path}: dtype {spec.dtype} is none of {', '.join(DTYPES)}.")
    array = np.empty(spec.shape, DTYPES[spec.dtype])
    with spec.path.open("rb") as file:
        file.seek(spec.offset)
        view, done = array.reshape(-1).view(np.uint8).data, 0
        while done < spec.nbytes and (count := file.readinto(view[done:])):
            done += count
    if done != spec.nbytes:
        raise UserError(f"{spec.path} is cut short.")
    return array


def layer_of(spec: Spec, layer: int) -> Spec:
    """The part of a stacked tensor that belongs to one layer: one range of bytes."""
    shape = spec.shape[1:]
    one = math.prod(shape) * _WIDTHS[spec.dtype]
    return dataclasses.replace(spec, shape=shape, offset=spec.offset + layer * one)


def make_header(shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """The bytes before the tensors of a file that holds them in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def reserve(path: epath.Path, header: bytes, nbytes: int) -> None:
    """Makes a file with this header and room for `nbytes` behind it, to be filled by `write_at`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + nbytes)


def write_at(descriptor: int, array: np.ndarray, offset: int) -> None:
    """Writes an array's bytes at a place of an open file."""
    view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def write_folder(
    folder: epath.Path,
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read_tensor: Callable[[str], np.ndarray],
    max_bytes: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Writes tensors, read one by one, into files of at most `max_bytes` each, and their index.

    A tensor larger than that gets a file of its own. `on_progress` is told the bytes written so far.
    """
    groups = list(_group(shapes, max_bytes))
    names = [FILE]
    if len(groups) > 1:
        names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    places: dict[str, str] = {}
    done = 0
    for file_name, group in zip(names, groups, strict=True):
        with (folder / file_name).open("wb") as file:
            file.write(make_header({name: shapes[name] for name in group}))
            for name in group:
                array = np.ascontiguousarray(read_tensor(name))
                file.write(array.reshape(-1).view(np.uint8).data)
                places[name] = file_name
                done += array.nbytes
                on_progress(done)
            file.flush()
            os.fsync(file.fileno())
    if len(groups) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        files.write_json(folder / INDEX, index)
    return names


def _group(
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], max_bytes: int
) -> Iterator[Sequence[str]]:
    group: list[str] = []
    filled = 0
    for name, (dtype, shape) in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if group and filled + nbytes > max_bytes:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += nbytes
    yield group
