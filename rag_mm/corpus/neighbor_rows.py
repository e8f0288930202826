"""The neighbors of a corpus's documents in a memory: what `corpus neighbors` wrote."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.corpus.corpus_manifest import MANIFEST, shard_file
from rag_mm.corpus.corpus_reader import TokenCorpus
from rag_mm.memory.index.live_rows import MISSING
from rag_mm.memory.store import manifest

FORMAT = 1
QUERIES = ("text", "image")  # A document's neighbors by each.
DOCUMENTS = "documents"  # Folder of the memory's documents as a corpus.


def folder_of(corpus: Path, memory: str) -> Path:
    """Where a corpus keeps its neighbors in the memory of a fingerprint."""
    return corpus / f"neighbors-{memory[:16]}"


@dataclasses.dataclass(frozen=True)
class NeighborsManifest:
    """What a folder of neighbors is.

    Attributes:
        corpus, memory: fingerprints of both.
        settings: how they were searched.
        rows: stored documents of each shard of the corpus.
        files: size and digest of each file, by path relative to the folder.
        figures: shares of queries with all their neighbors, and the like.
    """

    corpus: str
    memory: str
    settings: Mapping[str, Any]
    rows: tuple[int, ...]
    files: Mapping[str, manifest.FileEntry]
    figures: Mapping[str, Any]

    def write(self, root: Path) -> None:
        """Writes the manifest; from then on the folder is whole."""
        files.write_json(root / MANIFEST, {"format": FORMAT, **dataclasses.asdict(self)})


class NeighborRows:
    """Neighbors, opened for reading; thread-safe.

    Attributes:
        path: the folder.
        manifest: describes it.
        documents: the memory's documents, which neighbors are numbers of.
    """

    def __init__(self, path: Path, corpus: TokenCorpus):
        """Opens the neighbors of a corpus.

        Raises:
            UserError: they are unfinished, damaged, or of another corpus or an earlier state of it.
        """
        self.path, self._corpus = path, corpus
        self.manifest = _read(path)
        self.check_corpus(corpus)
        for name, entry in self.manifest.files.items():
            if problem := manifest.check_file(path, name, entry, deep=False):
                raise UserError(problem)
        self.documents = TokenCorpus(path / DOCUMENTS)
        self.documents.check_tokenizer(corpus.manifest.tokenizer)
        self._starts = np.cumsum([0, *self.manifest.rows])
        self._shards = [
            np.load(path / shard_file("neighbors", i, "npy"), mmap_mode="r", allow_pickle=False)
            for i in range(len(self.manifest.rows))
        ]

    def check_corpus(self, corpus: TokenCorpus) -> None:
        """Raises UserError unless the neighbors are those of this corpus as it is."""
        if self.manifest.corpus != corpus.fingerprint:
            raise UserError(
                f"{self.path} holds neighbors of another corpus than {corpus.path}, or of its earlier state; "
                "delete the folder and run `rag-mm corpus neighbors` again."
            )

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Neighbors of documents, int [N], by each of `QUERIES`, best first: int32 [N, 2, K]."""
        places = self._corpus.places(numbers)
        shard = np.searchsorted(self._starts, places, side="right") - 1
        found = np.full((len(places), *self._shards[0].shape[1:]), MISSING, np.int32)
        for i in np.unique(shard).tolist():
            at = shard == i
            found[at] = self._shards[i][places[at] - self._starts[i]]
        return found

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def lengths(self, max_text_len: int) -> np.ndarray:
        """`TokenCorpus.lengths` of the memory's documents."""
        return self.documents.lengths(max_text_len)


def _read(root: Path) -> NeighborsManifest:
    path = root / MANIFEST
    if not path.exists():
        raise UserError(f"{root} holds no finished neighbors; run `rag-mm corpus neighbors`.")
    fields = files.read_object(path)
    if (version := fields.pop("format", None)) != FORMAT:
        raise UserError(
            f"{path} has format {version}, not {FORMAT}; delete {root} and search again."
        )
    try:
        entries = {name: manifest.FileEntry(**e) for name, e in fields["files"].items()}
        return NeighborsManifest(**{**fields, "files": entries, "rows": tuple(fields["rows"])})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete {root} and search again.") from error
