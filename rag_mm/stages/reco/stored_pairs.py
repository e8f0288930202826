"""Pairs of embeddings in shards of half precision, as many as a disk holds, and the neighbors of each pair.

    document_pairs/pairs.json                       the towers, the memory and the pairs of each shard
    document_pairs/train/shards/image-00000.npy     float16 [n, D]; text-00000.npy alike
    fusion/neighbors/shards/image-00000.npy         int32 [n, K], rows of the memory; text-00000.npy alike

Files are mapped into memory: a training step reads the rows of its batch, wherever they lie.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import files, processes, progress
from rag_mm.core.errors import UserError
from rag_mm.corpus import folder_parts, shuffled_order
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.memory.store import shard_file
from rag_mm.memory.store.mapped_rows import MappedRows
from rag_mm.models import reco
from rag_mm.stages.reco.refinement import Bank, SearchSettings

METADATA, TRAIN, NEIGHBORS = "pairs.json", "train", "neighbors"


@dataclasses.dataclass(frozen=True)
class UsedMemory:
    """The version of a memory that pairs belong to, at its absolute path."""

    folder: str
    version: int
    fingerprint: str

    @classmethod
    def of(cls, memory: Memory) -> "UsedMemory":
        """Describes an open memory."""
        return cls(os.path.realpath(memory.path), memory.manifest.version, memory.fingerprint)

    def open(self) -> Memory:
        """Opens it.

        Raises:
            UserError: it is not at its place any more, or is another one.
        """
        memory = Memory.open(self.folder, version=self.version)
        if memory.fingerprint != self.fingerprint:
            raise UserError(
                f"Version {self.version} of {self.folder} is not the memory that the pairs were embedded "
                "for; put that one back."
            )
        return memory


@dataclasses.dataclass(frozen=True, eq=False)
class StoredPairs:
    """P pairs of an image and its text, on disk.

    Attributes:
        columns: embeddings by modality, [P, D] or more rows; of length 1 up to half precision.
        rows: number of pairs in each shard; of the last one fewer may be used than it has.
        towers: fingerprint of the frozen towers.
        memory: where their neighbors are.
    """

    columns: Mapping[str, MappedRows]
    rows: tuple[int, ...]
    towers: str
    memory: UsedMemory

    @property
    def dim(self) -> int:
        """Width D of the embeddings."""
        return self.columns["image"].dim

    def __len__(self) -> int:
        return sum(self.rows)

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Some pairs: `image` and `text`, float32 [B, D], and `class_ids`, int32 [B], which nobody knows."""
        batch = {name: column[rows] for name, column in self.columns.items()}
        return batch | {"class_ids": np.full(len(rows), -1, np.int32)}

    def draw(self, epoch: int, positions: np.ndarray, seed: int) -> np.ndarray:
        """Which pairs are at some positions of an epoch, int64 [B]; see `pipeline.make_array_batches`."""
        return shuffled_order.permute(positions, len(self), seed, epoch)


@dataclasses.dataclass(frozen=True, eq=False)
class StoredNeighbors:
    """The neighbors of P pairs, on disk.

    Attributes:
        table: [N, D].
        ids: rows of `table`, [P, K], -1 for a missing neighbor.
    """

    table: MappedRows
    ids: MappedRows

    def take(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Neighbors of some pairs, float32 [B, K, D], and which of them are present, bool [B, K]."""
        ids = self.ids[pairs]
        return self.table[ids], ids >= 0


def write_shard(
    root: Path, number: int, columns: Mapping[str, np.ndarray], dtype: type
) -> list[Path]:
    """Writes the columns of one shard, `image` and `text`, each an array [n, ...], as files of their own."""
    paths = [_file(root, name, number) for name in columns]
    for path, values in zip(paths, columns.values(), strict=True):
        files.write_array(path, values.astype(dtype))
    return paths


def finish(
    stage_dir: epath.Path,
    rows: Sequence[int],
    used: int,
    dim: int,
    towers: str,
    memory: UsedMemory,
) -> None:
    """Writes `pairs.json`, once all shards of `stage_dir`/train are whole.

    Args:
        stage_dir: the stage's folder.
        rows: number of pairs in each shard.
        used: how many of all pairs are used, the first ones.
        dim: width of the embeddings.
        towers: fingerprint of the frozen towers.
        memory: where the pairs' neighbors are.
    """
    metadata = {"rows": list(rows), "used": used, "dim": dim, "towers": towers}
    files.write_json(stage_dir / METADATA, metadata | {"memory": dataclasses.asdict(memory)})


def load(folder: epath.Path) -> StoredPairs:
    """Opens the pairs of a finished stage.

    Raises:
        UserError: a file is missing or damaged.
    """
    path = folder / METADATA
    kinds = {"rows": list, "used": int, "dim": int, "towers": str, "memory": dict}
    values = files.read_object(path, **kinds)
    try:
        memory = UsedMemory(**values["memory"])
        stored = tuple(int(count) for count in values["rows"])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}).") from error
    columns = {
        name: _map(Path(folder / TRAIN), name, stored, values["dim"], np.float16)
        for name in reco.MODALITIES
    }
    ends = np.minimum(np.cumsum([0, *stored]), values["used"])
    rows = tuple(count for count in np.diff(ends).tolist() if count)
    return StoredPairs(columns, rows, values["towers"], memory)


def find_neighbors(
    search: SearchSettings, pairs: StoredPairs, stage_dir: epath.Path
) -> dict[str, StoredNeighbors]:
    """Retrieves the neighbors of all pairs, by modality; every process calls it and does its share.

    What was found before a kill is kept: `stage_dir`/neighbors has a part for each shard of the pairs.

    Raises:
        UserError: the memory is not at its place any more, or is empty.
    """
    memory = pairs.memory.open()
    columns = {name: memory.mapped(name) for name in reco.MODALITIES}
    if not len(memory):
        raise UserError(f"{memory.path} is empty; add documents to it first.")

    @functools.cache  # An interrupted training that is resumed has found all, and needs no index.
    def bank() -> Bank:
        return Bank(columns, {name: memory.index(name) for name in reco.MODALITIES})

    root = Path(stage_dir / NEIGHBORS)
    starts = np.cumsum([0, *pairs.rows]).tolist()
    with progress.track("fusion: neighbors", len(pairs)) as bar:

        def make(number: int) -> tuple[dict[str, Any], Sequence[Path]]:
            part = slice(starts[number], starts[number + 1])
            found = {
                name: _find(search, bank(), name, pairs.columns[name], part, number)
                for name in reco.MODALITIES
            }
            bar.update(part.stop)
            return {"rows": pairs.rows[number]}, write_shard(root, number, found, np.int32)

        plan = {
            "what": "neighbors of pairs",
            "search": dataclasses.asdict(search),
            "memory": pairs.memory.fingerprint,
            "towers": pairs.towers,
            "rows": list(pairs.rows),
        }
        folder_parts.run(root, plan, len(pairs.rows), make)
        processes.broadcast_from_leader("found")
    tables = pairs.columns if search.retrieval_override == "query" else columns
    return {
        name: StoredNeighbors(
            tables[name if tables is pairs.columns else getattr(search, name).columns(name)[1]],
            _map(root, name, pairs.rows, search.num_neighbors, np.int32),
        )
        for name in reco.MODALITIES
    }


def _find(
    search: SearchSettings,
    bank: Bank,
    modality: str,
    column: MappedRows,
    part: slice,
    number: int,
) -> np.ndarray:
    """The neighbors of a part of the pairs as rows of their table, int32 [n, K]."""
    seed = int(np.random.SeedSequence((search.seed, number)).generate_state(1)[0])
    part_search = dataclasses.replace(search, seed=seed)
    found = part_search.find(bank, modality, column[part]).ids
    return found + part.start if search.retrieval_override == "query" else found


def _file(root: Path, name: str, number: int) -> Path:
    return root / folder_parts.SHARDS / f"{name}-{number:05d}.npy"


def _map(root: Path, name: str, rows: Sequence[int], dim: int, dtype: type) -> MappedRows:
    parts = [
        shard_file.load_array(_file(root, name, number), (count, dim), dtype)
        for number, count in enumerate(rows)
    ]
    return MappedRows(parts, dim, dtype=np.int32 if dtype is np.int32 else np.float32)
