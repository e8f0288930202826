"""Finds the neighbors of a corpus's documents in a memory, shard by shard.

As in training on a world (`stages.shared.find_neighbors`), a query is one modality of a document, never the
whole: its text, from which words are dropped, or its first image. Images are those of the corpus's sources,
which are read again; codes alone would give other embeddings.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rag_mm.core import caption_text, checks, document_types, files, processes
from rag_mm.core.errors import UserError
from rag_mm.corpus import (
    corpus_shard,
    folder_parts,
    neighbor_rows,
    repeated_ids,
    write_corpus,
)
from rag_mm.corpus.corpus_manifest import MANIFEST, shard_file
from rag_mm.corpus.corpus_reader import TokenCorpus
from rag_mm.corpus.neighbor_rows import MISSING, QUERIES
from rag_mm.data import source_ranges
from rag_mm.data.token_documents import IMAGE
from rag_mm.memory import policy
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.memory.store import manifest
from rag_mm.memory.store import shard_file as memory_shards
from rag_mm.memory.writing import stream

_AT_ONCE = 1024  # Documents searched together.


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """How neighbors are searched.

    Attributes:
        num_neighbors: number of neighbors of each query.
        word_dropout: probability of dropping each word of a text query (RA-CM3: 20 %).
        max_similarity: see `policy.Rules`; None for no bound.
        max_equal_codes: see `policy.Rules`; 1 for no bound.
        seed: of the words dropped.
    """

    num_neighbors: int = 2
    word_dropout: float = 0.2
    max_similarity: float | None = None
    max_equal_codes: float = 1.0
    seed: int = 0

    def __post_init__(self):
        checks.at_least(self, 1, "num_neighbors")
        checks.at_least(self, 0, "seed")
        checks.at_least(self, -1, "max_similarity")
        checks.below_one(self, "word_dropout")
        checks.between(self, 0, 1, "max_equal_codes")

    @property
    def rules(self) -> policy.Rules:
        """The bounds on hits."""
        return policy.Rules(self.max_similarity, self.max_equal_codes)


class MemorySource:
    """A memory's documents, in the order of its rows."""

    def __init__(self, memory: Memory):
        self._memory = memory
        self.size: int | None = len(memory)
        self.fingerprint = memory.fingerprint

    def read(self, start: int) -> Iterator[stream.Item]:
        """Items from row `start` on."""
        for row in range(start, len(self._memory)):
            yield stream.Item(row + 1, self._memory.document(row))


def search(
    corpus: TokenCorpus,
    memory: Memory,
    sources: Sequence[stream.RecordStream],
    tokenizer: corpus_shard.CodeTokenizer,
    options: SearchOptions,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Writes the neighbors of all documents; of several processes, every one calls it.

    Args:
        corpus: the documents.
        memory: with its retriever attached.
        sources: those that the corpus was built from, in order.
        tokenizer: the corpus's, which encodes the memory's documents.
        options: how neighbors are searched.
        on_progress: called with the number of documents that this process is done with: those of the memory,
            which are encoded first, and those of the corpus.

    Returns:
        The folder.

    Raises:
        UserError: a source changed, or there are neighbors of this memory found with other options, or before
            the corpus was changed.
    """
    folder = neighbor_rows.folder_of(corpus.path, memory.fingerprint)
    settings = {"sources": [source.fingerprint for source in sources], **vars(options)}
    if (folder / MANIFEST).exists():
        _check_same(neighbor_rows.NeighborRows(folder, corpus), settings)
        return folder
    corpus.check_tokenizer(tokenizer.fingerprint)
    parts = _ranges(corpus, sources)
    searcher = _ShardSearcher(corpus, memory, options)
    plan = {
        "what": "neighbors",
        "corpus": corpus.fingerprint,
        "memory": memory.fingerprint,
        **settings,
    }
    done = itertools.count(1 + len(memory) // jax.process_count())

    def make(number: int) -> tuple[dict[str, Any], Sequence[Path]]:
        def counted() -> Iterator[document_types.Document]:
            for document in _match(corpus, number, *parts[number]):
                on_progress(next(done))
                yield document

        path = folder / shard_file("neighbors", number, "npy")
        found = searcher.find(number, counted())
        files.write_array(path, found)
        return {"found": (found >= 0).sum(axis=(0, 2)).tolist()}, [path]

    with folder_parts.lock(folder):
        _write_documents(folder / neighbor_rows.DOCUMENTS, memory, tokenizer, on_progress)
        marks = folder_parts.run(folder, plan, len(parts), make)
        if marks is not None:
            _finish(folder, corpus, memory, settings, marks)
    processes.broadcast_from_leader("finished")
    return folder


def _check_same(found: neighbor_rows.NeighborRows, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if found.manifest.settings.get(name) != value:
            raise UserError(
                f"{found.path} was searched with {name} {found.manifest.settings.get(name)}, not {value}; "
                "delete it to search again."
            )


def _ranges(
    corpus: TokenCorpus, sources: Sequence[stream.RecordStream]
) -> list[tuple[stream.RecordStream, source_ranges.Range]]:
    """The source and the range of each shard."""
    entries = corpus.manifest.sources
    if len(entries) != len(sources):
        raise UserError(f"{corpus.path} was built from {len(entries)} sources, not {len(sources)}.")
    for entry, source in zip(entries, sources, strict=True):
        if source.fingerprint != entry.fingerprint:
            raise UserError(
                f"{entry.name} has changed since {corpus.path} was built; build the corpus again."
            )
    size = corpus.manifest.shard_size
    return [(source, part) for source in sources for part in source_ranges.split(source, size)]


def _match(
    corpus: TokenCorpus, number: int, source: stream.RecordStream, part: source_ranges.Range
) -> Iterator[document_types.Document]:
    """The documents of a range that are in the corpus, in its order.

    Raises:
        UserError: they are not those of the corpus.
    """
    path = corpus.path / shard_file("ids", number, "npy")
    left = iter(files.read_array(path).tolist())
    expected = next(left, None)
    for item in source_ranges.read(source, part):
        if item.document is None or expected is None:
            continue
        if int(repeated_ids.hash_ids([item.document.id])[0]) == expected:
            yield item.document
            expected = next(left, None)
    if expected is not None:
        raise UserError(
            f"A source of {corpus.path} has changed since it was built; build the corpus again."
        )


def _write_documents(
    folder: Path,
    memory: Memory,
    tokenizer: corpus_shard.CodeTokenizer,
    on_progress: Callable[[int], None],
) -> None:
    """Writes the memory's documents as a corpus, in the order of its rows."""
    if not (folder / MANIFEST).exists():
        options = write_corpus.BuildOptions(on_progress=on_progress)
        write_corpus.build(folder, {"memory": MemorySource(memory)}, tokenizer, None, options)


def _finish(
    folder: Path,
    corpus: TokenCorpus,
    memory: Memory,
    settings: Mapping[str, Any],
    marks: Sequence[Mapping[str, Any]],
) -> None:
    entries = {n: manifest.FileEntry(**e) for mark in marks for n, e in mark["files"].items()}
    total = np.sum([mark["found"] for mark in marks], axis=0)
    most = max(1, len(corpus) * settings["num_neighbors"])
    neighbor_rows.NeighborsManifest(
        corpus=corpus.fingerprint,
        memory=memory.fingerprint,
        settings=settings,
        rows=tuple(shard.rows for shard in corpus.manifest.shards),
        files=entries,
        figures={f"found_by_{q}": round(n / most, 4) for q, n in zip(QUERIES, total, strict=True)},
    ).write(folder)


class _ShardSearcher:
    """Searches a memory for batches of documents."""

    def __init__(self, corpus: TokenCorpus, memory: Memory, options: SearchOptions):
        self._corpus, self._memory, self._options = corpus, memory, options
        self._read_codes = memory.code_reader(corpus.manifest.tokenizer)
        if options.max_equal_codes < 1 and self._read_codes is None:
            raise UserError(
                f"{memory.path} has no codes of the corpus's image tokenizer, which --max-equal-codes "
                "compares; add them by `rag-mm memory add-codes`."
            )

    def find(self, number: int, documents: Iterator[document_types.Document]) -> np.ndarray:
        """Memory rows of the neighbors of a shard's documents by each of `QUERIES`: int32 [D, 2, K]."""
        found = [np.zeros((0, len(QUERIES), self._options.num_neighbors), np.int32)]
        start = 0
        while batch := list(itertools.islice(documents, _AT_ONCE)):
            found.append(self._find_batch(number, start, batch))
            start += len(batch)
        return np.concatenate(found)

    def _find_batch(
        self, number: int, start: int, batch: Sequence[document_types.Document]
    ) -> np.ndarray:
        shape = (len(batch), len(QUERIES), self._options.num_neighbors)
        found = np.full(shape, MISSING, np.int32)
        texts = [caption_text.clean(document.text) for document in batch]
        own = self._own_rows(batch)
        keys = np.array([_key(memory_shards.caption_hash(text)) for text in texts], np.int64)
        has_text = np.flatnonzero([bool(text) for text in texts])
        if len(has_text):
            queries = [self._drop_words(number, start + i, texts[i]) for i in has_text.tolist()]
            encoded = self._memory.encode(text=queries)
            found[has_text, 0] = self._select(encoded, own[has_text], keys[has_text], None)
        images = {i: d.image for i, d in enumerate(batch) if d.image is not None}
        if images:
            at = np.array(list(images))
            encoded = self._memory.encode(image=list(images.values()))
            codes = self._query_codes(number, start + at)
            found[at, 1] = self._select(encoded, own[at], keys[at], codes)
        return found

    def _select(
        self,
        queries: np.ndarray,
        own_rows: np.ndarray,
        keys: np.ndarray,
        query_codes: np.ndarray | None,
    ) -> np.ndarray:
        return policy.find_neighbors(
            self._memory.index("mixed").search,
            queries,
            self._memory.embeddings("mixed"),
            num_neighbors=self._options.num_neighbors,
            query_rows=own_rows,
            query_keys=keys,
            row_keys=self._row_keys,
            **self._options.rules.bounds(self._read_codes, query_codes),
        ).ids

    def _drop_words(self, number: int, row: int, text: str) -> str:
        rng = np.random.default_rng((self._options.seed, number, row))
        document = document_types.Document("", (document_types.Text(text),))
        return str(policy.make_query(document, "text", rng, self._options.word_dropout))

    def _query_codes(self, number: int, rows: np.ndarray) -> np.ndarray | None:
        """Codes of the documents' first images, int32 [Q, N], where they are compared."""
        if self._options.max_equal_codes == 1:
            return None
        before = sum(shard.rows for shard in self._corpus.manifest.shards[:number])
        read = self._corpus.read_stored(before + rows)
        first = [next(s.ids for s in d.example.segments if s.kind == IMAGE) for d in read]
        return np.stack(first).astype(np.int32)

    def _own_rows(self, batch: Sequence[document_types.Document]) -> np.ndarray:
        """Rows of the memory's documents of the same ids, int64 [Q]; -1 for none."""
        return self._ids.find(repeated_ids.hash_ids(document.id for document in batch))

    @functools.cached_property
    def _ids(self) -> repeated_ids.SortedHashes:
        return repeated_ids.SortedHashes(repeated_ids.hash_ids(self._memory.ids))

    @functools.cached_property
    def _row_keys(self) -> np.ndarray:
        return np.array([_key(found) for found in self._memory.caption_hashes()], np.int64)


def _key(caption_hash: str) -> int:
    """A number for `policy.select`: documents of one caption do not read each other."""
    return int(caption_hash, 16) >> 1 if caption_hash else policy.NO_KEY
