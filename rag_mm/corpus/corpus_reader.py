"""Reads a corpus: documents by number, at random, from any thread."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from array_record.python import array_record_module
from etils import epath

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.corpus import corpus_manifest
from rag_mm.corpus.corpus_manifest import shard_file
from rag_mm.corpus.token_record import TokenDocument, TokenFormat
from rag_mm.data import vocabulary
from rag_mm.data.flat_documents import FlatDocuments
from rag_mm.memory.index import live_rows
from rag_mm.memory.store import manifest

T = TypeVar("T")
# In the calling thread: starting threads for each batch of small records takes several times as long.
_OPTIONS, _BUFFER = "readahead_buffer_size:0,max_parallelism:1", 32768


class StoredDocuments:
    """The records of a corpus's shards by their place in the files; thread-safe."""

    def __init__(self, root: Path, rows: Sequence[int], form: TokenFormat):
        """Opens no file yet; `rows` are the numbers of documents in the shards."""
        self._root, self._format = root, form
        self._starts = np.cumsum([0, *rows])
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without open files: each worker process of a loader opens its own."""
        return {**self.__dict__, "_readers": {}}

    def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        if shard not in self._readers:
            path = self._root / shard_file("records", shard, "arrayrecord")
            self._readers[shard] = array_record_module.ArrayRecordReader(
                str(path), options=_OPTIONS, file_reader_buffer_size=_BUFFER
            )
        return self._readers[shard]

    def read(self, places: np.ndarray) -> list[TokenDocument]:
        """The documents at these places, int [N], read together.

        Raises:
            UserError: one is damaged.
        """
        return self._parse(
            places, lambda records: [self._format.from_bytes(data) for data in records]
        )

    def read_flat(self, places: np.ndarray) -> FlatDocuments:
        """As `read`, without provenance and much faster."""
        return self._parse(places, self._format.read_flat)

    def _parse(self, places: np.ndarray, parse: Callable[[Sequence[bytes]], T]) -> T:
        places = np.asarray(places, np.int64)
        shards = np.searchsorted(self._starts, places, side="right") - 1
        records = np.empty(len(places), object)
        try:
            for shard in np.unique(shards).tolist():
                at = np.flatnonzero(shards == shard)
                read = self._reader(shard).read((places[at] - self._starts[shard]).tolist())
                for i, data in zip(at.tolist(), read, strict=True):
                    records[i] = data
            return parse(records.tolist())
        except (UserError, RuntimeError) as error:  # RuntimeError: ArrayRecord's checksum.
            raise UserError(f"A record of {self._root} cannot be read: {error}") from error


class TokenCorpus:
    """A corpus, opened for reading; thread-safe. Documents are numbered from 0.

    Attributes:
        path: its folder.
        manifest: describes it.
    """

    def __init__(self, path: epath.PathLike):
        """Opens a corpus after cheap checks: its manifest, and the size of every file.

        Raises:
            UserError: the folder is remote, no corpus, unfinished or damaged.
        """
        self.path = manifest.local_folder(path)
        self.manifest = corpus_manifest.read(self.path)
        duplicates = files.read_array(self.path / corpus_manifest.DUPLICATES)
        if duplicates.dtype != np.int64 or len(duplicates) != self.manifest.duplicates:
            raise UserError(f"{self.path / corpus_manifest.DUPLICATES} was changed.")
        self._live = live_rows.LiveRows(self.manifest.stored, duplicates)
        rows = [shard.rows for shard in self.manifest.shards]
        self._stored = StoredDocuments(self.path, rows, self.manifest.format)

    def __len__(self) -> int:
        return self.manifest.documents

    @property
    def fingerprint(self) -> str:
        """SHA-256 of documents and models."""
        return self.manifest.fingerprint

    @functools.cached_property
    def vocabulary(self) -> vocabulary.Vocabulary:
        """The ids of texts and codes.

        Raises:
            UserError: the vocabulary in the corpus was changed.
        """
        path = self.path / corpus_manifest.TOKENIZER / "vocabulary.json"
        found = vocabulary.load_vocabulary(path)
        if found.fingerprint != self.manifest.vocabulary:
            raise UserError(f"{path} was changed; build the corpus again.")
        return found

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raises UserError unless the corpus holds codes of the image tokenizer of this fingerprint."""
        if fingerprint != self.manifest.tokenizer:
            raise UserError(
                f"{self.path} holds codes of the image tokenizer {self.manifest.tokenizer[:12]}, not of "
                f"{fingerprint[:12]}; build a corpus with this one, or train on {self.path}/tokenizer."
            )

    def read(self, numbers: np.ndarray) -> list[TokenDocument]:
        """The documents of these numbers, int [N], read together; raises UserError if one is damaged."""
        return self._stored.read(self.places(numbers))

    def read_flat(self, numbers: np.ndarray) -> FlatDocuments:
        """As `read`, without provenance and much faster."""
        return self._stored.read_flat(self.places(numbers))

    def read_stored(self, places: np.ndarray) -> list[TokenDocument]:
        """The stored documents at these places, int [N], duplicates included."""
        return self._stored.read(places)

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Where documents lie among the stored ones, int64 [N]."""
        return self._live.stored[numbers]

    def lengths(self, max_text_len: int) -> np.ndarray:
        """Tokens of every document with one more after each segment, int32 [D]; texts are cut."""
        parts = [self._shard_lengths(i, max_text_len) for i in range(len(self.manifest.shards))]
        return np.concatenate(parts)[self._live.stored]

    def id_hashes(self) -> np.ndarray:
        """`repeated_ids.hash_ids` of every document, uint64 [D]."""
        return self._of_shards("ids", lambda number, stored: stored)

    def segment_counts(self) -> np.ndarray:
        """The numbers of texts and of images of every document, int32 [D, 2]."""

        def count(number: int, segments: np.ndarray) -> np.ndarray:
            row, kind, _ = segments.T
            rows = self.manifest.shards[number].rows
            counts = np.bincount(2 * row.astype(np.int64) + kind, minlength=2 * rows)
            return counts.reshape(rows, 2).astype(np.int32)

        return self._of_shards("segments", count)

    def _of_shards(self, what: str, read: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
        """An array with a row per document, from one of the files of each shard."""
        parts = []
        for number in range(len(self.manifest.shards)):
            path = self.path / shard_file(what, number, "npy")
            parts.append(read(number, np.load(path, mmap_mode="r", allow_pickle=False)))
        return np.concatenate(parts)[self._live.stored]

    def _shard_lengths(self, number: int, max_text_len: int) -> np.ndarray:
        path = self.path / shard_file("segments", number, "npy")
        row, kind, length = np.load(path, mmap_mode="r", allow_pickle=False).T
        length = np.where(kind == 0, np.minimum(length, max_text_len), length) + 1
        rows = self.manifest.shards[number].rows
        return np.bincount(row, weights=length, minlength=rows).astype(np.int32)
