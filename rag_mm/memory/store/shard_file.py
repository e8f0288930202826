"""Shards: the stored rows of a memory, as records to read single documents and as arrays to read all rows."""

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_data_source, array_record_module

from rag_mm.core import document_types, files
from rag_mm.core.errors import UserError
from rag_mm.memory import model_protocols
from rag_mm.memory.index import live_rows, protocol
from rag_mm.memory.store import manifest, record


def load_rows(root: Path, contents: manifest.MemoryManifest, view: str) -> np.ndarray:
    """Embeddings of all stored rows in a view, float32 [R, D]; memory-mapped if they are one file.

    Raises:
        UserError: a file is not an array of the manifest's shape.
    """
    shards = map_rows(root, contents, view)
    if not shards:
        return np.zeros((0, contents.dim), np.float32)
    return shards[0] if len(shards) == 1 else np.concatenate(shards)


def map_rows(root: Path, contents: manifest.MemoryManifest, view: str) -> list[np.ndarray]:
    """The memory-mapped embeddings of each shard in a view, float32 [rows, D]; raises as `load_rows`."""
    return [
        load_array(
            root / shard.file(f"embeddings-{view}", "npy"), (shard.rows, contents.dim), np.float32
        )
        for shard in contents.shards
    ]


def load_live(root: Path, contents: manifest.MemoryManifest) -> live_rows.LiveRows:
    """The stored rows that were not removed.

    Raises:
        UserError: the list of removed rows is damaged.
    """
    if not contents.removed:
        return live_rows.LiveRows(contents.stored)
    path = root / contents.folder / manifest.REMOVED
    removed = load_array(path, (contents.removed,), np.int64)
    live = None
    if removed.min() >= 0 and removed.max() < contents.stored:
        live = live_rows.LiveRows(contents.stored, removed)
    if live is None or live.num_removed != contents.removed:
        raise UserError(f"{path} lists rows that do not exist: the memory is damaged.")
    return live


def load_codes(
    root: Path, contents: manifest.MemoryManifest, shard: manifest.Shard, tokenizer: str
) -> np.ndarray | None:
    """An image tokenizer's codes of the first pictures of a shard's rows; None in a memory without them.

    Returns:
        int32 [rows, N], -1 for a row without codes.

    Raises:
        UserError: the file is not an array of the manifest's shape.
    """
    num_codes = contents.codes_per_image(tokenizer)
    if num_codes is None:
        return None
    name, shape = contents.code_file(shard, tokenizer), (shard.rows, num_codes)
    if name not in contents.files:  # None of its rows has codes.
        return np.full(shape, protocol.MISSING, np.int32)
    return load_array(root / name, shape, np.int32)


def load_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Memory-maps an array file.

    Raises:
        UserError: the file is missing or damaged, or has another shape or dtype.
    """
    files.refuse_special(path)
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # A damaged header can raise almost any exception.
        raise UserError(f"{path} is not a readable array ({error}).") from error
    if values.shape != shape or values.dtype != dtype:
        raise UserError(f"{path} holds {values.dtype} {values.shape} instead of {shape}.")
    return values


def load_ids(root: Path, contents: manifest.MemoryManifest) -> list[str]:
    """The documents' ids in the order of the stored rows.

    Raises:
        UserError: a file is not a list of the manifest's length.
    """
    ids = []
    for shard in contents.shards:
        path = root / shard.file("ids", "json")
        shard_ids = files.read_json(path)
        if (
            not isinstance(shard_ids, list)
            or len(shard_ids) != shard.rows
            or not all(isinstance(name, str) for name in shard_ids)
        ):
            raise UserError(f"{path} does not hold {shard.rows} ids: the memory is damaged.")
        ids += shard_ids
    return ids


@dataclasses.dataclass(frozen=True)
class Origins:
    """Provenance of a shard's rows, one entry per row.

    Attributes:
        url, license: as given by the documents.
        caption: `caption_hash` of the text; empty without text.
        image: whether the document has a picture, an image or a video.
    """

    url: list[str | None]
    license: list[str | None]
    caption: list[str]
    image: list[bool]


_ORIGINS = {"url": str | None, "license": str | None, "caption": str, "image": bool}


def caption_hash(text: str) -> str:
    """A hash that ignores case, punctuation and spacing; empty for an empty text."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
    # A text without any word characters is compared verbatim.
    normalized = " ".join(words) or text.strip()
    return files.digest(normalized.encode())[:16] if normalized else ""


def load_origins(root: Path, contents: manifest.MemoryManifest, shard: manifest.Shard) -> Origins:
    """The origins of a shard's rows; read from its records if an older memory has no origins file.

    Raises:
        UserError: a file is damaged.
    """
    path = root / shard.file("origins", "json")
    if path.relative_to(root).as_posix() not in contents.files:
        records = Records(root, [shard])
        return _origins_of([records[position].document for position in range(shard.rows)])
    values = files.read_object(path)
    if set(values) != set(_ORIGINS) or not all(
        isinstance(values[name], list)
        and len(values[name]) == shard.rows
        and all(isinstance(value, kinds) for value in values[name])
        for name, kinds in _ORIGINS.items()
    ):
        raise UserError(f"{path} does not hold {shard.rows} origins: the memory is damaged.")
    return Origins(**values)


class Records:
    """The records of some shards, read by stored position; thread-safe."""

    def __init__(self, root: Path, shards: Sequence[manifest.Shard]):
        """Opens no file yet."""
        self._root = root
        paths = [
            f"{root / shard.file('records', 'arrayrecord')}[0:{shard.rows}]" for shard in shards
        ]
        # The library cannot make a source of no files; no record is then ever read.
        self._source: Sequence[bytes] = ()
        if paths:
            self._source = array_record_data_source.ArrayRecordDataSource(paths)

    def __getitem__(self, position: int) -> record.Record:
        """The record at a stored position.

        Raises:
            UserError: it is damaged.
        """
        try:
            return record.from_bytes(self._source[int(position)])
        except (UserError, RuntimeError) as error:  # RuntimeError: ArrayRecord's checksum.
            raise UserError(f"Record {position} of {self._root} cannot be read: {error}") from error


class ShardWriter:
    """Writes one shard: the records immediately, the arrays when it is closed."""

    def __init__(self, root: Path, contents: manifest.MemoryManifest, folder: str, number: int):
        """Starts shard `number` in an existing folder of the memory that `contents` describes."""
        self._root = root
        self._contents = contents
        self._shard = manifest.Shard(folder, number, 0, 0, 0)
        self._paths = [root / self._shard.file("records", "arrayrecord")]
        self._writer = array_record_module.ArrayRecordWriter(str(self._paths[0]), "group_size:1")
        self._origins = Origins([], [], [], [])
        self._embeddings: dict[str, list[np.ndarray]] = {v: [] for v in model_protocols.VIEWS}
        self._codes: dict[str, dict[int, np.ndarray]] = {}  # By tokenizer and row.
        self._ids: list[str] = []

    @property
    def rows(self) -> int:
        """Number of records written so far."""
        return len(self._ids)

    def write(self, records: Iterable[record.Record]) -> None:
        """Appends records; each must have an embedding of every view."""
        for entry in records:
            self._writer.write(record.to_bytes(entry))
            self._ids.append(entry.document.id)
            for view, rows in self._embeddings.items():
                rows.append(entry.embeddings[view])
            for tokenizer in entry.codes:
                codes = entry.first_codes(tokenizer)
                if codes is not None:
                    self._codes.setdefault(tokenizer, {})[self.rows - 1] = codes
            origins = vars(_origins_of([entry.document]))
            for name, values in vars(self._origins).items():
                values += origins[name]

    def close(self) -> tuple[manifest.Shard, dict[str, manifest.FileEntry]]:
        """Finishes the files and flushes them to disk; returns the shard and its files by path."""
        self._writer.close()
        self._write_bytes("ids", files.canonical_json(self._ids).encode())
        self._write_bytes(
            "origins", files.canonical_json(dataclasses.asdict(self._origins)).encode()
        )
        for view, rows in self._embeddings.items():
            self._write_array(self._shard.file(f"embeddings-{view}", "npy"), np.stack(rows))
        for tokenizer, codes in sorted(self._codes.items()):
            values = np.full(
                (self.rows, len(next(iter(codes.values())))), protocol.MISSING, np.int32
            )
            values[list(codes)] = np.stack(list(codes.values()))
            self._write_array(self._contents.code_file(self._shard, tokenizer), values)
        shard = dataclasses.replace(
            self._shard,
            rows=self.rows,
            with_text=sum(caption != "" for caption in self._origins.caption),
            with_image=sum(self._origins.image),
        )
        return shard, manifest.seal_all(self._root, self._paths)

    def _write_bytes(self, what: str, data: bytes) -> None:
        self._paths.append(self._root / self._shard.file(what, "json"))
        self._paths[-1].write_bytes(data)

    def _write_array(self, name: str, values: np.ndarray) -> None:
        self._paths.append(self._root / name)
        np.save(self._paths[-1], values)


def _origins_of(documents: Sequence[document_types.Document]) -> Origins:
    return Origins(
        url=[d.url for d in documents],
        license=[d.license for d in documents],
        caption=[caption_hash(d.text) for d in documents],
        image=[d.image is not None for d in documents],
    )
