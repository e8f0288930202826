"""Speed of the corpus loader, and of neighbors read at random or stored beside each document.

The corpus is generated: random codes, and captions of random words.
"""

import functools
import pathlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
from array_record.python import array_record_data_source, array_record_module

from rag_mm.core import code_grids, document_types
from rag_mm.corpus import corpus_loader, neighbor_rows, write_corpus
from rag_mm.corpus.corpus_manifest import MANIFEST, shard_file
from rag_mm.corpus.corpus_reader import TokenCorpus
from rag_mm.corpus.packing_plan import MixturePart, RowsConfig
from rag_mm.data import joint_layout, masking, packing, sequences, vocabulary
from rag_mm.data.flat_documents import FlatDocuments
from rag_mm.memory.store import manifest
from rag_mm.memory.writing import stream

_NUM_WORDS, _MAX_SPANS, _READ_TOGETHER = 12, 3, 256
_DOCS = 2


class _RandomCodes:
    """An image tokenizer whose codes are random; its images are two pixels a side."""

    image_size, image_batch = 2, 256

    def __init__(self, num_codes: int):
        side = round(num_codes**0.5)
        self.grids: code_grids.Grids = ((side, num_codes // side),)
        self.fingerprint = f"{num_codes} random codes"
        words = [f"word{i} " * 2 for i in range(100)]
        self.vocabulary = vocabulary.train_vocabulary(words, 1000, 8192, _MAX_SPANS)
        self._num_codes, self._rng = num_codes, np.random.default_rng(0)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        return self._rng.integers(0, 8192, (len(pixels), self._num_codes)).astype(np.int32)


class _RandomDocuments:
    """A source of any number of documents, of which none is kept."""

    def __init__(self, count: int, seed: int):
        self.size: int | None = count
        self.fingerprint, self._seed = f"{count} {seed}", seed

    def read(self, start: int) -> Iterator[stream.Item]:
        image = document_types.Image(np.zeros((2, 2, 3), np.uint8))
        for i in range(start, self.size or 0):
            words = np.random.default_rng((self._seed, i)).integers(0, 100, _NUM_WORDS)
            text = " ".join(f"word{word}" for word in words)
            segments = (document_types.Text(text), image)
            yield stream.Item(i + 1, document_types.Document(f"{self._seed}-{i}", segments))


def run(
    num_documents: int, num_codes: int, num_rows: int, length: int = 4096, num_workers: int = 0
) -> dict[str, Any]:
    """Generates a corpus with neighbors, and measures.

    Args:
        num_documents: of the corpus, and as many of the memory.
        num_codes: codes per image.
        num_rows: rows of `length` tokens that are loaded with and without neighbors.
        length: tokens per row.
        num_workers: see `corpus_loader.make_batches`.

    Returns:
        Rows per second, also of processor time of this process; how full they are; documents read per
        second of processor time; bytes; and the peak of resident memory in GiB.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        started = time.process_time()
        corpus = _generate(root / "corpus", num_documents, num_codes, 0)
        figures: dict[str, Any] = {"build_cpu_seconds": time.process_time() - started}
        neighbors = _neighbors(corpus, num_documents, num_codes)
        for name, found in (("plain", None), (f"{_DOCS}_neighbors", neighbors)):
            part = MixturePart(corpus, neighbors=found)
            figures[name] = _load(part, num_rows, length, num_workers)
        figures["read"] = _compare(root, corpus, neighbors)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"documents": num_documents, "codes": num_codes, **figures, "peak_gib": peak}


def _generate(path: pathlib.Path, count: int, num_codes: int, seed: int) -> TokenCorpus:
    tokenizer = _RandomCodes(num_codes)
    carried = path.with_name("carried")
    carried.mkdir(parents=True, exist_ok=True)
    tokenizer.vocabulary.save(carried / "vocabulary.json")
    options = write_corpus.BuildOptions()
    source = {"generated": _RandomDocuments(count, seed)}
    write_corpus.build(path, source, tokenizer, carried, options)
    return TokenCorpus(path)


def _neighbors(corpus: TokenCorpus, count: int, num_codes: int) -> neighbor_rows.NeighborRows:
    """Random neighbors, in another corpus of as many documents."""
    folder = neighbor_rows.folder_of(corpus.path, "generated")
    _generate(folder / neighbor_rows.DOCUMENTS, count, num_codes, 1)
    rng, paths = np.random.default_rng(2), []
    shards = [shard.rows for shard in corpus.manifest.shards]
    for number, rows in enumerate(shards):
        paths.append(folder / shard_file("neighbors", number, "npy"))
        paths[-1].parent.mkdir(exist_ok=True)
        np.save(paths[-1], rng.integers(0, count, (rows, 2, _DOCS)).astype(np.int32))
    files = manifest.seal_all(folder, paths)
    neighbor_rows.NeighborsManifest(
        corpus.fingerprint, "generated", {}, tuple(shards), files, {}
    ).write(folder)
    assert (folder / MANIFEST).exists()
    return neighbor_rows.NeighborRows(folder, corpus)


def _load(part: MixturePart, num_rows: int, length: int, num_workers: int) -> dict[str, float]:
    """Loads rows of masked sequences."""
    vocab, batch_size = part.corpus.vocabulary, 16
    num_codes = sum(rows * columns for rows, columns in part.corpus.manifest.grids)
    layout = sequences.Layout(_DOCS, 64, num_codes, _MAX_SPANS, sequences.PACKED, length)
    weights = (1.0,) if part.neighbors is None else (0.0, 0.0, 1.0)
    config = RowsConfig(length, 0, 64, weights, reserve=3 * _MAX_SPANS)
    iterator = corpus_loader.make_batches(
        [part],
        config,
        batch_size,
        functools.partial(_draw, layout, vocab),
        padding={"tokens": vocab.pad, "targets": vocab.pad},
        num_workers=num_workers,
    )
    next(iterator)
    wall, cpu, filled, done = time.monotonic(), time.process_time(), 0.0, 0
    while done < num_rows:
        filled += float((next(iterator)["segment_ids"] > 0).mean()) * batch_size
        done += batch_size
    return {
        "rows_per_second": done / (time.monotonic() - wall),
        "rows_per_cpu_second": done / (time.process_time() - cpu),
        "fill": filled / done,
    }


def _draw(
    layout: sequences.Layout,
    vocab: vocabulary.Vocabulary,
    documents: FlatDocuments,
    num_docs: np.ndarray,
    generators: joint_layout.Generators,
) -> tuple[packing.Row, np.ndarray]:
    """Sequences as RA-CM3's, half of them masked."""
    plain = joint_layout.lay_out_all(layout, vocab, documents, num_docs)
    masks = masking.Masking(segment_mask_prob=0.5, mask_prob=0.5)
    spans = joint_layout.sample_all_spans(masks, plain, generators, _MAX_SPANS)
    masked = joint_layout.mask_all(layout, vocab, plain, spans)
    return joint_layout.as_arrays(vocab, masked), masked.lengths


def _compare(
    root: pathlib.Path, corpus: TokenCorpus, neighbors: neighbor_rows.NeighborRows
) -> dict[str, float]:
    """Documents with two neighbors that are read per second of processor time, and what they take on disk."""
    form = corpus.manifest.format
    path = root / "joined.arrayrecord"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for start in range(0, len(corpus), _READ_TOGETHER):
        numbers = np.arange(start, min(start + _READ_TOGETHER, len(corpus)))
        rows = neighbors.take(numbers).reshape(len(numbers), -1)
        docs = neighbors.documents.read(rows.ravel())
        for i, main in enumerate(corpus.read(numbers)):
            own = docs[i * rows.shape[1] : (i + 1) * rows.shape[1]]
            writer.write(msgpack.packb([form.to_bytes(each) for each in (main, *own)]))
    writer.close()
    source = array_record_data_source.ArrayRecordDataSource([str(path)])

    def at_random(numbers: np.ndarray) -> None:
        corpus.read(numbers)
        neighbors.documents.read(neighbors.take(numbers)[:, 0].ravel())

    def joined(numbers: np.ndarray) -> None:
        for record in source.__getitems__(numbers.tolist()):
            _ = [form.from_bytes(data) for data in msgpack.unpackb(record)[: 1 + _DOCS]]

    stored = sum(
        entry.size
        for each in (corpus, neighbors.documents)
        for entry in each.manifest.files.values()
    )
    return {
        "at_random": _per_cpu_second(at_random, len(corpus)),
        "joined": _per_cpu_second(joined, len(corpus)),
        "at_random_bytes": stored,
        "joined_bytes": path.stat().st_size,
    }


def _per_cpu_second(read: Callable[[np.ndarray], None], size: int) -> float:
    order = np.random.default_rng(3).permutation(size)
    started, done = time.process_time(), 0
    for start in range(0, min(size, 40 * _READ_TOGETHER), _READ_TOGETHER):
        numbers = order[start : start + _READ_TOGETHER]
        read(numbers)
        done += len(numbers)
    return done / (time.process_time() - started)
