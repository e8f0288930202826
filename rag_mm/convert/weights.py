"""Streaming weight conversion: safetensors shards to one file or to sharded arrays, and back.

One tensor is in memory at a time. Our file holds a model's parameters by path, with layers stacked
(`stack/blocks/mlp/up/kernel` [L, D, F]), in the checkpoint's dtype (float32, float16 or bfloat16). So a layer
is a contiguous range of bytes in both.
"""

import collections
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from rag_mm.convert import shards
from rag_mm.convert.shards import TensorSpec
from rag_mm.convert.table import Family, TensorMapping
from rag_mm.core.errors import UserError
from rag_mm.nn.param_trees import Params, leaves_by_path

Parts = Iterable[tuple[int | None, np.ndarray]]
Progress = Callable[[int], None]


def no_progress(done: int) -> None:
    """Ignores progress; `done` is in bytes."""


def check_tensors(
    family: Family, config: Any, specs: Mapping[str, TensorSpec]
) -> list[TensorMapping]:
    """The mappings of a checkpoint, after checking each tensor's name, shape and dtype against the model.

    Raises:
        UserError: a tensor is missing or unexpected, has another shape or an unsupported dtype, or differs in
            dtype from the same tensor of other layers.
    """
    try:
        mappings = family.mappings(config)
    except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise UserError(f"config.json describes no {family.name}: {str(error)[:200]}.") from error
    expected = {mapping.theirs for mapping in mappings}
    for mapping in mappings:
        spec = specs.get(mapping.theirs)
        if spec is None:
            raise UserError(
                f"The checkpoint lacks {mapping.theirs}, which its config.json requires."
            )
        if spec.shape != mapping.shape:
            raise UserError(
                f"{mapping.theirs} has shape {list(spec.shape)}, but its config.json implies "
                f"{list(mapping.shape)}."
            )
        if spec.dtype not in shards.DTYPES:
            supported = ", ".join(shards.DTYPES)
            raise UserError(
                f"{mapping.theirs} has dtype {spec.dtype}; supported dtypes are {supported}."
            )
    for name in specs:
        if name not in expected and not family.is_ignored(config, name):
            raise UserError(
                f"The checkpoint holds {name}, which a {family.name} with its config does not have."
            )
    dtypes: dict[str, str] = {}
    for mapping in mappings:
        dtype = specs[mapping.theirs].dtype
        if dtypes.setdefault(mapping.ours, dtype) != dtype:
            raise UserError(
                f"{mapping.theirs} is {dtype}, but {dtypes[mapping.ours]} in other layers; save the model "
                "in one dtype."
            )
    return mappings


def stored_shapes(
    mappings: Sequence[TensorMapping], specs: Mapping[str, TensorSpec], dtype: np.dtype | None
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and shape of every parameter of our file by path; `dtype` None keeps the checkpoint's."""
    num_layers = collections.Counter(
        mapping.ours for mapping in mappings if mapping.layer is not None
    )
    return {
        mapping.ours: (
            dtype or shards.DTYPES[specs[mapping.theirs].dtype],
            ((num_layers[mapping.ours],) if mapping.layer is not None else ()) + mapping.ours_shape,
        )
        for mapping in mappings
    }


def num_bytes(shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> int:
    """Total bytes of the tensors."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())


def write_file(
    path: epath.Path,
    mappings: Sequence[TensorMapping],
    specs: Mapping[str, TensorSpec],
    dtype: np.dtype | None = None,
    on_progress: Progress = no_progress,
) -> None:
    """Converts a checkpoint to our file, with one tensor in memory at a time.

    Not atomic: a kill leaves an incomplete file, which the caller must not use (a stage counts as finished
    only once its manifest is written).
    """
    shapes = stored_shapes(mappings, specs, dtype)
    header = shards.make_header(shapes)
    shards.reserve(path, header, num_bytes(shapes))
    targets = shards.read_header(path)
    # In the order of the bytes in the shards, so that these are read sequentially.
    order = sorted(mappings, key=lambda p: (specs[p.theirs].path, specs[p.theirs].offset))
    descriptor, done = os.open(path, os.O_WRONLY), 0
    try:
        for mapping in order:
            target = targets[mapping.ours]
            if mapping.layer is not None:
                target = shards.layer_spec(target, mapping.layer)
            theirs = shards.read_tensor(specs[mapping.theirs])
            ours = mapping.transform.load(theirs, mapping.ours_shape)
            stored = np.ascontiguousarray(ours, shards.DTYPES[target.dtype])
            shards.write_at(descriptor, stored, target.offset)
            done += target.nbytes
            on_progress(done)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_shards(
    mappings: Sequence[TensorMapping],
    specs: Mapping[str, TensorSpec],
    abstract: Params,
    dtype: np.dtype | None = None,
    on_progress: Progress = no_progress,
) -> Params:
    """Loads a checkpoint directly into the shardings of `abstract`.

    In addition to its devices' shards, a host holds one parameter and one tensor at a time.

    Args:
        mappings: from `check_tensors`.
        specs: from `shards.open_folder`.
        abstract: shapes with shardings, from `Family.describe`; its dtypes are ignored.
        dtype: to cast to; None keeps the stored one.
        on_progress: called with the bytes read so far.
    """
    grouped: dict[str, list[TensorMapping]] = collections.defaultdict(list)
    for mapping in mappings:
        grouped[mapping.ours].append(mapping)
    done = 0

    def read(group: list[TensorMapping]) -> Iterator[tuple[int | None, np.ndarray]]:
        nonlocal done
        for mapping in group:
            spec = specs[mapping.theirs]
            yield (
                mapping.layer,
                mapping.transform.load(shards.read_tensor(spec), mapping.ours_shape),
            )
            done += spec.nbytes
            on_progress(done)

    return _place_all(
        abstract,
        lambda path: read(grouped[path]),
        lambda path: dtype or shards.DTYPES[specs[grouped[path][0].theirs].dtype],
    )


def load_file(path: epath.Path, abstract: Params, dtype: np.dtype | None = None) -> Params:
    """Loads our file into the shardings of `abstract`; arguments as for `load_shards`.

    Raises:
        UserError: the file is missing or damaged, or holds another model's parameters.
    """
    specs = shards.read_header(path)
    if {name: spec.shape for name, spec in specs.items()} != {
        name: leaf.shape for name, leaf in leaves_by_path(abstract).items()
    }:
        raise UserError(f"{path} does not hold the parameters of the model in its config.json.")

    def read(name: str) -> Iterator[tuple[int | None, np.ndarray]]:
        spec = specs[name]
        if "stack/blocks/" not in name:
            yield None, shards.read_tensor(spec)
            return
        # Layer by layer: reading a whole stack at once would hold it twice on the host.
        for layer in range(spec.shape[0]):
            yield layer, shards.read_tensor(shards.layer_spec(spec, layer))

    return _place_all(abstract, read, lambda name: dtype or shards.DTYPES[specs[name].dtype])


def _place_all(
    abstract: Params, read: Callable[[str], Parts], dtype_of: Callable[[str], np.dtype]
) -> Params:
    leaves = [
        _place(leaf, dtype_of(path), read(path)) for path, leaf in leaves_by_path(abstract).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _place(leaf: jax.ShapeDtypeStruct, dtype: np.dtype, parts: Parts) -> jax.Array:
    """One parameter; fills each device's shard as its layers are read."""
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    buffers: dict[str, tuple[tuple[slice, ...], np.ndarray]] = {}
    for index in indices.values():  # Devices with the same shard have one buffer.
        bounds = [part.indices(size) for part, size in zip(index, leaf.shape, strict=True)]
        shape = [stop - start for start, stop, _ in bounds]
        buffers.setdefault(str(index), (index, np.empty(shape, dtype)))
    for layer, part in parts:
        for index, buffer in buffers.values():
            if layer is None:
                buffer[...] = part[index]
                continue
            layers = range(leaf.shape[0])[index[0]]
            if layer in layers:
                buffer[layers.index(layer)] = part[index[1:]]
    device_shards = [jax.device_put(buffers[str(index)][1], d) for d, index in indices.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, device_shards)


def read_mapped(specs: Mapping[str, TensorSpec], mapping: TensorMapping) -> np.ndarray:
    """A checkpoint tensor, from the specs of our file."""
    spec = specs[mapping.ours]
    ours = shards.read_tensor(
        spec if mapping.layer is None else shards.layer_spec(spec, mapping.layer)
    )
    return mapping.transform.save(ours)


def write_shards(
    folder: epath.Path,
    mappings: Sequence[TensorMapping],
    dtype_of: Callable[[TensorMapping], np.dtype],
    read: Callable[[TensorMapping], np.ndarray],
    max_bytes: int,
    on_progress: Progress = no_progress,
) -> list[str]:
    """Writes an external checkpoint's shards; returns the names of its files.

    Args:
        folder: an existing folder.
        mappings: of the model.
        dtype_of: dtype to write a tensor in.
        read: mapping -> the checkpoint tensor, see `read_mapped`.
        max_bytes: of one file.
        on_progress: called with the bytes written so far.
    """
    by_name = {mapping.theirs: mapping for mapping in mappings}
    shapes = {name: (dtype_of(mapping), mapping.shape) for name, mapping in by_name.items()}

    def read_as(name: str) -> np.ndarray:
        return read(by_name[name]).astype(shapes[name][0], copy=False)

    return shards.write_folder(folder, shapes, read_as, max_bytes, on_progress)
