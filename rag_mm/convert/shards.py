"""Safetensors files, single or sharded with an index, read and written one tensor at a time.

A file is a length, a JSON header and raw bytes, so reading a tensor is reading one range. Headers are checked
against the file before any tensor is read, and nothing is ever unpickled.
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1}
_WIDTHS |= {"BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1} | {n: d.itemsize for n, d in DTYPES.items()}
_MAX_HEADER = 100 << 20
_PIECE = 16 << 20
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Where a tensor is stored; `dtype` is its name in the format, such as F32.

    Of a tensor in a file of another format, `decode` makes the array, and `offset` says in which order.
    """

    path: epath.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    decode: Callable[[], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * _WIDTHS[self.dtype]


def read_header(path: epath.Path) -> dict[str, TensorSpec]:
    """The tensors of one file by name, in the order of their bytes.

    Raises:
        UserError: the file is missing, truncated or no regular file, or its header is invalid or does not
            match it.
    """
    files.refuse_special(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise UserError(f"{path} is truncated or not a safetensors file.")
            header = files.parse_json(file.read(length))
        header.pop("__metadata__", None)
        specs = [_spec(path, name, entry, 8 + length) for name, entry in header.items()]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} has no valid safetensors header ({error}).") from error
    by_name = dict(sorted(specs, key=lambda item: (item[1].offset, item[1].nbytes)))
    end = 8 + length
    for name, spec in by_name.items():
        if spec.offset != end:
            raise UserError(f"{path}: tensor {name} overlaps another or follows a gap.")
        end = spec.offset + spec.nbytes
    if end != size:
        problem = "is truncated" if end > size else "has extra bytes after its last tensor"
        raise UserError(f"{path} {problem}: it has {size:,} bytes, but its header says {end:,}.")
    return by_name


def _spec(
    path: epath.Path, name: str, entry: Mapping[str, Any], start: int
) -> tuple[str, TensorSpec]:
    shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in _WIDTHS:
        raise UserError(f"{path}: tensor {name} has unknown dtype {entry['dtype']!r}.")
    if any(type(n) is not int or n < 0 for n in (*shape, first, last)):
        raise ValueError(f"tensor {name} has an invalid size")
    spec = TensorSpec(path, entry["dtype"], shape, start + first)
    if last - first != spec.nbytes:
        raise UserError(f"{path}: tensor {name} has {last - first} bytes, not {spec.nbytes}.")
    return name, spec


def open_folder(folder: epath.Path) -> Mapping[str, TensorSpec]:
    """All tensors of a checkpoint folder by name, file by file.

    A single file is read even if an index lies beside it, left by an earlier save: transformers does so too.

    Raises:
        UserError: it holds no safetensors, or its index names a missing file or one outside the folder, or
            does not match the files.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.")
    if (folder / FILE).exists():
        return read_header(folder / FILE)
    if not (folder / INDEX).exists():
        raise UserError(_no_checkpoint(folder))
    index = files.read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX} has no weight_map.")
    for name, file_name in weight_map.items():
        _check_file_name(folder, name, file_name)
    specs: dict[str, TensorSpec] = {}
    for file_name in sorted(set(weight_map.values())):
        for name, spec in read_header(folder / file_name).items():
            if weight_map.get(name) != file_name:
                raise UserError(
                    f"{folder / file_name} holds {name}, but {INDEX} does not map it there."
                )
            specs[name] = spec
    for name, file_name in weight_map.items():
        if name not in specs:
            raise UserError(f"{folder / file_name} does not hold {name}, which {INDEX} maps to it.")
    return specs


def _check_file_name(folder: epath.Path, name: str, file_name: Any) -> None:
    if not isinstance(file_name, str) or not re.fullmatch(r"[\w-][\w.-]*", file_name, re.ASCII):
        raise UserError(f"{INDEX} maps {name} to {file_name!r}, which is not a plain file name.")
    if file_name.endswith(_PICKLES):
        raise UserError(_pickled(file_name))
    if not file_name.endswith(".safetensors"):
        raise UserError(f"{INDEX} maps {name} to {file_name!r}, which is not a safetensors file.")
    if not (folder / file_name).is_file():
        raise UserError(f"{INDEX} names {file_name}, which is not in {folder}.")


def _no_checkpoint(folder: epath.Path) -> str:
    for path in sorted(folder.iterdir()):
        if path.name.endswith(_PICKLES):
            return _pickled(path.name)
    return f"{folder} holds neither {FILE} nor {INDEX}."


def _pickled(name: str) -> str:
    return (
        f"{name} is a pickle file, which can execute arbitrary code when loaded; only safetensors are "
        "supported. Save the model again with its library (save_pretrained writes safetensors)."
    )


def read_tensor(spec: TensorSpec) -> np.ndarray:
    """A tensor as a new array.

    Raises:
        UserError: its dtype is not float32, float16 or bfloat16, or the file has been truncated.
    """
    if spec.dtype not in DTYPES:
        raise UserError(f"{spec.path}: dtype {spec.dtype} is not one of {', '.join(DTYPES)}.")
    if spec.decode is not None:
        return spec.decode()
    array = np.empty(spec.shape, DTYPES[spec.dtype])
    with spec.path.open("rb") as file:
        file.seek(spec.offset)
        view, done = array.reshape(-1).view(np.uint8).data, 0
        while done < spec.nbytes and (count := file.readinto(view[done:])):
            done += count
    if done != spec.nbytes:
        raise UserError(f"{spec.path} is truncated.")
    return array


def is_equal(a: TensorSpec, b: TensorSpec) -> bool:
    """Whether two tensors have the same dtype, shape and bits; reads them in pieces."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with a.path.open("rb") as first, b.path.open("rb") as second:
        first.seek(a.offset)
        second.seek(b.offset)
        pieces = [_PIECE] * (a.nbytes // _PIECE) + [a.nbytes % _PIECE]
        return all(first.read(size) == second.read(size) for size in pieces)


def layer_spec(spec: TensorSpec, layer: int) -> TensorSpec:
    """One layer of a stacked tensor: a contiguous range of its bytes."""
    shape = spec.shape[1:]
    layer_bytes = math.prod(shape) * _WIDTHS[spec.dtype]
    return dataclasses.replace(spec, shape=shape, offset=spec.offset + layer * layer_bytes)


def make_header(shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """The header of a file that holds these tensors in this order: length and JSON."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for name, (dtype, shape) in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def reserve(path: epath.Path, header: bytes, nbytes: int) -> None:
    """Creates a file with this header followed by `nbytes` zero bytes, to be filled by `write_at`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + nbytes)


def write_at(descriptor: int, array: np.ndarray, offset: int) -> None:
    """Writes an array's bytes to an open file at an offset."""
    view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def write_folder(
    folder: epath.Path,
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    load: Callable[[str], np.ndarray],
    max_bytes: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Writes tensors one by one to files of at most `max_bytes` each, and an index if there are several.

    Args:
        folder: an existing folder.
        shapes: dtype and shape of each tensor by name, in the order of writing.
        load: name -> the tensor.
        max_bytes: of one file; a larger tensor gets a file of its own.
        on_progress: called with the bytes written so far.

    Returns:
        The names of the files.
    """
    groups = list(_group(shapes, max_bytes))
    names = [FILE]
    if len(groups) > 1:
        names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    weight_map: dict[str, str] = {}
    done = 0
    for file_name, group in zip(names, groups, strict=True):
        with (folder / file_name).open("wb") as file:
            file.write(make_header({name: shapes[name] for name in group}))
            for name in group:
                array = np.ascontiguousarray(load(name))
                file.write(array.reshape(-1).view(np.uint8).data)
                weight_map[name] = file_name
                done += array.nbytes
                on_progress(done)
            file.flush()
            os.fsync(file.fileno())
    if len(groups) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        files.write_json(folder / INDEX, index)
    return names


def _group(
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], max_bytes: int
) -> Iterator[Sequence[str]]:
    group: list[str] = []
    group_bytes = 0
    for name, (dtype, shape) in shapes.items():
        nbytes = math.prod(shape) * dtype.itemsize
        if group and group_bytes + nbytes > max_bytes:
            yield group
            group, group_bytes = [], 0
        group.append(name)
        group_bytes += nbytes
    yield group
