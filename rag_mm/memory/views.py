"""Embeddings and index of each view of one version of a memory, opened on first use."""

import threading
from pathlib import Path

import numpy as np

from rag_mm.memory import model_protocols
from rag_mm.memory.index import live_rows, protocol, registry
from rag_mm.memory.store import manifest, mapped_rows, shard_file


class Views:
    """Embeddings, codes and indexes of the rows that were not removed; thread-safe."""

    def __init__(self, root: Path, contents: manifest.MemoryManifest, live: live_rows.LiveRows):
        """Opens no file yet."""
        self._root = root
        self._manifest = contents
        self._live = live
        self._indexes: dict[str, protocol.Index] = {}
        self._codes: dict[str, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def codes(self, rows: np.ndarray, tokenizer: str) -> np.ndarray:
        """An image tokenizer's codes of the first picture of some rows.

        Args:
            rows: int [...].
            tokenizer: its fingerprint.

        Returns:
            int32 [..., N], -1 for a row without codes.

        Raises:
            ValueError: the memory has no codes of this tokenizer.
        """
        num_codes = self._manifest.codes_per_image(tokenizer)
        if num_codes is None:
            raise ValueError(f"{self._root} has no codes of {tokenizer}")
        stored = np.asarray(self._live.stored)[rows]
        codes = np.full((*stored.shape, num_codes), protocol.MISSING, np.int32)
        start = 0
        for part in self._code_shards(tokenizer):
            inside = (stored >= start) & (stored < start + len(part))
            codes[inside] = part[stored[inside] - start]
            start += len(part)
        return codes

    def _code_shards(self, tokenizer: str) -> list[np.ndarray]:
        """The memory-mapped codes of each shard, opened once: a search reads them hit by hit."""
        if tokenizer not in self._codes:
            shards = (
                shard_file.load_codes(self._root, self._manifest, shard, tokenizer)
                for shard in self._manifest.shards
            )
            self._codes[tokenizer] = [codes for codes in shards if codes is not None]
        return self._codes[tokenizer]

    def embeddings(self, view: str) -> np.ndarray:
        """Unit-length embeddings, float32 [R, D]; memory-mapped if they are one file without removed rows."""
        model_protocols.check_view(view)
        rows = shard_file.load_rows(self._root, self._manifest, view)
        return rows[self._live.stored] if self._live.num_removed else rows

    def mapped(self, view: str) -> mapped_rows.MappedRows:
        """The same embeddings, memory-mapped however many files they are."""
        model_protocols.check_view(view)
        parts = shard_file.map_rows(self._root, self._manifest, view)
        stored = self._live.stored if self._live.num_removed else None
        return mapped_rows.MappedRows(parts, self._manifest.dim, stored)

    def index(self, view: str) -> protocol.Index:
        """The index of a view, loaded on first use; raises UserError if it is damaged."""
        model_protocols.check_view(view)
        with self._lock:
            if view not in self._indexes:
                searcher = registry.make_index(self._manifest.index)
                rows = shard_file.load_rows(self._root, self._manifest, view)
                searcher.load(self._root / self._manifest.index_folder(view), rows)
                if self._live.num_removed:
                    searcher.remove(self._live.removed)
                self._indexes[view] = searcher
            return self._indexes[view]
