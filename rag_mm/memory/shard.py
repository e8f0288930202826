"""Shards: the rows of a memory on disk, as records for reading one and as arrays for all."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from rag_mm.core import document as document_lib
from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.memory import encoder as encoder_lib
from rag_mm.memory import index, manifest, record


def load_rows(root: Path, contents: manifest.Manifest, view: str) -> np.ndarray:
    """Embeddings of a view, float32 [R, D], mapped from disk where they are in one file.

    Raises:
        UserError: a file is not an array of the manifest's shape.
    """
    shards = [
        load_array(
            root / shard.file(f"embeddings-{view}", "npy"), (shard.rows, contents.dim), np.float32
        )
        for shard in contents.shards
    ]
    return shards[0] if len(shards) == 1 else np.concatenate(shards)


def load_codes(root: Path, contents: manifest.Manifest, shard: manifest.Shard) -> np.ndarray | None:
    """Codes of a shard's rows, int32 [rows, N], -1 where a row has none; None in a memory without.

    Raises:
        UserError: the file is not an array of the manifest's shape.
    """
    if contents.num_codes is None:
        return None
    name, shape = shard.file("codes", "npy"), (shard.rows, contents.num_codes)
    if name not in contents.files:  # None of its rows has an image.
        return np.full(shape, index.MISSING, np.int32)
    return load_array(root / name, shape, np.int32)


def load_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Maps an array from disk.

    Raises:
        UserError: the file is missing, damaged, or of another shape or dtype.
    """
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # A damaged header raises whatever its parser stumbled over.
        raise UserError(f"{path} is not a readable array ({error}).") from error
    if values.shape != shape or values.dtype != dtype:
        raise UserError(f"{path} holds {values.dtype} {values.shape} instead of {shape}.")
    return values


def load_ids(root: Path, contents: manifest.Manifest) -> list[str]:
    """The documents' ids in row order.

    Raises:
        UserError: a file is not a list of the manifest's length.
    """
    ids = []
    for shard in contents.shards:
        path = root / shard.file("ids", "json")
        found = files.read_json(path)
        if not isinstance(found, list) or len(found) != shard.rows:
            raise UserError(f"{path} does not hold {shard.rows} ids: the memory is damaged.")
        ids += [str(name) for name in found]
    return ids


class ShardWriter:
    """One shard: records as they come, arrays when it is closed."""

    def __init__(self, root: Path, folder: str, number: int):
        """Starts shard `number` in a folder of the memory that exists."""
        self._root = root
        self._shard = manifest.Shard(folder, number, 0, 0, 0)
        path = root / self._shard.file("records", "arrayrecord")
        self._records = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        self._ids: list[str] = []
        self._embeddings: dict[str, list[np.ndarray]] = {v: [] for v in encoder_lib.VIEWS}
        self._codes: list[np.ndarray | None] = []

    def write(
        self,
        documents: Sequence[document_lib.Document],
        embeddings: Mapping[str, np.ndarray],
        codes: Sequence[np.ndarray | None],
        tokenizer: str | None,
    ) -> None:
        """Appends documents with their embeddings [B, D] and codes."""
        for row, (document, values) in enumerate(zip(documents, codes, strict=True)):
            vectors = {view: rows[row] for view, rows in embeddings.items()}
            maker = None if values is None else tokenizer
            entry = record.Record(document, vectors, values, maker)
            self._records.write(record.to_bytes(entry))
        for view, rows in embeddings.items():
            self._embeddings[view].append(rows)
        self._ids += [document.id for document in documents]
        self._codes += codes
        self._shard = dataclasses.replace(
            self._shard,
            rows=len(self._ids),
            with_text=self._shard.with_text + sum(bool(d.text.strip()) for d in documents),
            with_image=self._shard.with_image + sum(d.image is not None for d in documents),
        )

    def close(self) -> manifest.Shard:
        """Finishes the files."""
        self._records.close()
        ids = files.canonical_json(self._ids).encode()
        files.write_atomic(self._root / self._shard.file("ids", "json"), ids)
        for view, batches in self._embeddings.items():
            rows = np.concatenate(batches)
            np.save(self._root / self._shard.file(f"embeddings-{view}", "npy"), rows)
        length = next((len(codes) for codes in self._codes if codes is not None), None)
        if length is not None:
            missing = np.full(length, index.MISSING, np.int32)
            codes = np.stack([missing if c is None else c for c in self._codes])
            np.save(self._root / self._shard.file("codes", "npy"), codes)
        return self._shard
