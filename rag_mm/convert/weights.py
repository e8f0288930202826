"""Weights on their way: from shards into one file or onto a mesh, and back, a tensor at a time.

Our file holds a model's parameters by path, layers stacked (`stack/blocks/mlp/up/kernel` [L, D, F]), in
whatever of float32, float16 and bfloat16 they came. So a layer is one range of bytes on either side.
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
from rag_mm.convert.shards import Spec
from rag_mm.convert.table import Family, Piece, named
from rag_mm.core.errors import UserError
from rag_mm.nn.param_trees import Params

Parts = Iterable[tuple[int | None, np.ndarray]]
Progress = Callable[[int], None]


def no_progress(done: int) -> None:
    """Tells nobody how many bytes are done."""


def check(family: Family, config: Any, specs: Mapping[str, Spec]) -> list[Piece]:
    """The pieces of a checkpoint, after holding every tensor's name, shape and dtype against the model.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape, of a dtype that is no model's, or
            of another dtype than the same tensor of other layers.
    """
    pieces = family.pieces(config)
    wanted = {piece.theirs for piece in pieces}
    for piece in pieces:
        spec = specs.get(piece.theirs)
        if spec is None:
            raise UserError(f"The checkpoint lacks {piece.theirs}, which its config.json asks for.")
        if spec.shape != piece.shape:
            raise UserError(
                f"{piece.theirs} has shape {list(spec.shape)}, but its config.json makes it "
                f"{list(piece.shape)}."
            )
        if spec.dtype not in shards.DTYPES:
            known = ", ".join(shards.DTYPES)
            raise UserError(f"{piece.theirs} has dtype {spec.dtype}; a weight is one of {known}.")
    for name in specs:
        if name not in wanted and not family.is_ignored(config, name):
            raise UserError(
                f"The checkpoint holds {name}, which no {family.name} of its config has."
            )
    dtypes: dict[str, str] = {}
    for piece in pieces:
        dtype = specs[piece.theirs].dtype
        if dtypes.setdefault(piece.ours, dtype) != dtype:
            raise UserError(
                f"{piece.theirs} is {dtype}, but {dtypes[piece.ours]} in other layers; save the model "
                "in one dtype."
            )
    return pieces


def stored_shapes(
    pieces: Sequence[Piece], specs: Mapping[str, Spec], dtype: np.dtype | None
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """What our file will hold: dtype and shape of every parameter by path; `dtype` None keeps each."""
    num_layers = collections.Counter(piece.ours for piece in pieces if piece.layer is not None)
    return {
        piece.ours: (
            dtype or shards.DTYPES[specs[piece.theirs].dtype],
            ((num_layers[piece.ours],) if piece.layer is not None else ()) + piece.ours_shape,
        )
        for piece in pieces
    }


def num_bytes(shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes.values())


def write_file(
    path: epath.Path,
    pieces: Sequence[Piece],
    specs: Mapping[str, Spec],
    dtype: np.dtype | None = None,
    on_progress: Progress = no_progress,
) -> None:
    """Converts a checkpoint into our file; one tensor is in memory at a time.

    The caller sees to it that a file cut short by a kill is not taken for a whole one (a run's stage is
    not done before its manifest says so).
    """
    shapes = stored_shapes(pieces, specs, dtype)
    header = shards.make_header(shapes)
    shards.reserve(path, header, num_bytes(shapes))
    targets = shards.read_header(path)
    # As the bytes lie in the shards, so that these are read from front to back.
    order = sorted(pieces, key=lambda p: (specs[p.theirs].path, specs[p.theirs].offset))
    descriptor, done = os.open(path, os.O_WRONLY), 0
    try:
        for piece in order:
            target = targets[piece.ours]
            if piece.layer is not None:
                target = shards.layer_of(target, piece.layer)
            theirs = shards.read(specs[piece.theirs])
            ours = piece.form.load(theirs, piece.ours_shape)
            stored = np.ascontiguousarray(ours, shards.DTYPES[target.dtype])
            shards.write_at(descriptor, stored, target.offset)
            done += target.nbytes
            on_progress(done)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_shards(
    pieces: Sequence[Piece],
    specs: Mapping[str, Spec],
    abstract: Params,
    dtype: np.dtype | None = None,
    on_progress: Progress = no_progress,
) -> Params:
    """Parameters straight from a checkpoint outside into the shardings of `abstract`.

    A host keeps, beside what its devices hold, the parameter under way and one tensor.

    Args:
        pieces: from `check`.
        specs: from `shards.open_folder`.
        abstract: shapes with shardings, as `nn.params.describe` gives them; its dtypes do not count.
        dtype: what to cast to; None keeps the stored one.
        on_progress: told the bytes read.
    """
    grouped: dict[str, list[Piece]] = collections.defaultdict(list)
    for piece in pieces:
        grouped[piece.ours].append(piece)
    done = 0

    def read(group: list[Piece]) -> Iterator[tuple[int | None, np.ndarray]]:
        nonlocal done
        for piece in group:
            spec = specs[piece.theirs]
            yield piece.layer, piece.form.load(shards.read(spec), piece.ours_shape)
            done += spec.nbytes
            on_progress(done)

    return _place_all(
        abstract,
        lambda path: read(grouped[path]),
        lambda path: dtype or shards.DTYPES[specs[grouped[path][0].theirs].dtype],
    )


def load_file(path: epath.Path, abstract: Params, dtype: np.dtype | None = None) -> Params:
    """Parameters of our file into the shardings of `abstract`; arguments as `load_shards`.

    Raises:
        UserError: the file is missing or damaged, or holds another model's parameters.
    """
    specs = shards.read_header(path)
    if {name: spec.shape for name, spec in specs.items()} != {
        name: leaf.shape for name, leaf in named(abstract).items()
    }:
        raise UserError(f"{path} does not hold the parameters of the model beside it.")

    def read(name: str) -> Iterator[tuple[int | None, np.ndarray]]:
        spec = specs[name]
        if "stack/blocks/" not in name:
            yield None, shards.read(spec)
            return
        for layer in range(
            spec.shape[0]
        ):  # A stack is read layer by layer, or a host would hold it twice.
            yield layer, shards.read(shards.layer_of(spec, layer))

    return _place_all(abstract, read, lambda name: dtype or shards.DTYPES[specs[name].dtype])


def _place_all(
    abstract: Params, read: Callable[[str], Parts], dtype_of: Callable[[str], np.dtype]
) -> Params:
    leaves = [_place(leaf, dtype_of(path), read(path)) for path, leaf in named(abstract).items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _place(leaf: jax.ShapeDtypeStruct, dtype: np.dtype, parts: Parts) -> jax.Array:
    """One parameter, each device's share filled as the parts come."""
    indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    buffers: dict[str, tuple[tuple[slice, ...], np.ndarray]] = {}
    for index in indices.values():  # Devices with one share have one buffer.
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
    shares = [jax.device_put(buffers[str(index)][1], d) for d, index in indices.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shares)


def read_piece(specs: Mapping[str, Spec], piece: Piece) -> np.ndarray:
    """One tensor as it is called outside, from our file's specs."""
    spec = specs[piece.ours]
    ours = shards.read(spec if piece.layer is None else shards.layer_of(spec, piece.layer))
    return piece.form.save(ours)


def write_shards(
    folder: epath.Path,
    pieces: Sequence[Piece],
    dtype_of: Callable[[Piece], np.dtype],
    read: Callable[[Piece], np.ndarray],
    max_bytes: int,
    on_progress: Progress = no_progress,
) -> list[str]:
    """Writes a checkpoint as it is called outside; returns its files' names.

    Args:
        folder: exists.
        pieces: of the model.
        dtype_of: what a tensor is written as.
        read: a piece as its tensor outside, see `read_piece`.
        max_bytes: of one file.
        on_progress: told the bytes written.
    """
    by_name = {piece.theirs: piece for piece in pieces}
    shapes = {name: (dtype_of(piece), piece.shape) for name, piece in by_name.items()}

    def read_as(name: str) -> np.ndarray:
        return read(by_name[name]).astype(shapes[name][0], copy=False)

    return shards.write_folder(folder, shapes, read_as, max_bytes, on_progress)
