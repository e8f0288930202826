"""Builds a corpus: documents are checked, turned into text ids and image codes, and written in shards."""

import collections
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rag_mm.core import files, processes
from rag_mm.core.errors import UserError
from rag_mm.corpus import (
    corpus_manifest,
    corpus_reader,
    corpus_shard,
    folder_parts,
    repeated_ids,
)
from rag_mm.corpus.corpus_manifest import shard_file
from rag_mm.data import source_ranges
from rag_mm.memory.store import manifest
from rag_mm.memory.writing import document_checks, ingest_report, stream


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """Options of a build.

    Attributes:
        shard_size: records of a source per shard; a tar is one shard.
        max_bad: largest share of bad records; one is always tolerated, except with 0.
        on_progress: called with the number of records that this process has read.
    """

    shard_size: int = 8192
    max_bad: float = 0.0
    on_progress: Callable[[int], None] = lambda done: None


def build(
    root: Path,
    sources: Mapping[str, stream.RecordStream],
    tokenizer: corpus_shard.CodeTokenizer,
    carried: Path | None,
    options: BuildOptions,
) -> None:
    """Builds a corpus; of several processes, every one calls it with the same arguments.

    A build that was killed makes only the shards that are missing when it is started again with the same
    sources and tokenizer; with others it starts over.

    Args:
        root: its folder.
        sources: documents by the name of their source, read in order.
        tokenizer: the image tokenizer.
        carried: folder of the tokenizer, which is copied into the corpus; None copies none.
        options: shards, bad records, progress.

    Raises:
        UserError: no documents, more bad ones than allowed, or a folder that is a corpus, is in use or
            cannot be written.
    """
    check_vacant(root)
    parts = {
        name: source_ranges.split(source, options.shard_size) for name, source in sources.items()
    }
    ranges = [(sources[name], part) for name in sources for part in parts[name]]
    if not ranges:
        raise UserError("There are no documents: give at least one.")
    read = _Counter(options.on_progress)

    def make(number: int) -> tuple[dict[str, Any], Sequence[Path]]:
        source, part = ranges[number]
        shard = corpus_shard.ShardDraft(root, number, tokenizer, options.max_bad == 0)
        return shard.write(read.count(source_ranges.read(source, part)))

    entries = [
        corpus_manifest.SourceEntry(name, source.fingerprint, len(parts[name]))
        for name, source in sources.items()
    ]

    with folder_parts.lock(root):
        marks = folder_parts.run(root, _plan(sources, tokenizer, options), len(ranges), make)
        if marks is not None:
            _finish(root, entries, tokenizer, carried, options, marks)
    processes.broadcast_from_leader("finished")


def check_vacant(root: Path) -> None:
    """Raises UserError if a build would overwrite a corpus, or files that no build made."""
    if (root / corpus_manifest.MANIFEST).exists():
        raise UserError(f"{root} is a corpus already: name another folder.")
    if root.exists() and not (root / folder_parts.LOCK).exists() and any(root.iterdir()):
        raise UserError(f"{root} is not empty: name another folder.")


def _plan(
    sources: Mapping[str, stream.RecordStream],
    tokenizer: corpus_shard.CodeTokenizer,
    options: BuildOptions,
) -> dict[str, Any]:
    return {
        "what": "corpus",
        "format": corpus_manifest.FORMAT,
        "sources": [[name, source.fingerprint] for name, source in sources.items()],
        "tokenizer": tokenizer.fingerprint,
        "vocabulary": tokenizer.vocabulary.fingerprint,
        "image_size": tokenizer.image_size,
        "shard_size": options.shard_size,
    }


class _Counter:
    """Counts the records that a process has read."""

    def __init__(self, on_progress: Callable[[int], None]):
        self._on_progress, self._done = on_progress, 0

    def count(self, items: Iterator[stream.Item]) -> Iterator[stream.Item]:
        for item in items:
            yield item
            self._done += 1
            self._on_progress(self._done)


def _finish(
    root: Path,
    sources: Sequence[corpus_manifest.SourceEntry],
    tokenizer: corpus_shard.CodeTokenizer,
    carried: Path | None,
    options: BuildOptions,
    marks: Sequence[Mapping[str, Any]],
) -> None:
    """Finds duplicates, writes the report and, last, the manifest."""
    shards = tuple(corpus_manifest.CorpusShard(**mark["shard"]) for mark in marks)
    duplicates = _write_report(root, tokenizer, options, shards, marks)
    if carried is not None:
        _carry(carried, root / corpus_manifest.TOKENIZER)
    further = [corpus_manifest.DUPLICATES, ingest_report.COUNTS, ingest_report.REJECTS]
    entries = {n: manifest.FileEntry(**e) for mark in marks for n, e in mark["files"].items()}
    entries |= manifest.seal_all(root, (root / n for n in further if (root / n).exists()))
    licenses: collections.Counter[str | None] = collections.Counter()
    for mark in marks:
        licenses.update(dict(mark["licenses"]))
    vocabulary = tokenizer.vocabulary
    corpus_manifest.CorpusManifest(
        tokenizer=tokenizer.fingerprint,
        vocabulary=vocabulary.fingerprint,
        text_size=vocabulary.text_size,
        codebook_size=vocabulary.codebook_size,
        image_size=tokenizer.image_size,
        grids=tokenizer.grids,
        shard_size=options.shard_size,
        sources=tuple(sources),
        shards=shards,
        files=entries,
        duplicates=duplicates,
        licenses=tuple(licenses.most_common()),
    ).write(root)


def _write_report(
    root: Path,
    tokenizer: corpus_shard.CodeTokenizer,
    options: BuildOptions,
    shards: Sequence[corpus_manifest.CorpusShard],
    marks: Sequence[Mapping[str, Any]],
) -> int:
    """Writes the duplicates, and counts and names all bad records; returns the number of duplicates.

    Raises:
        UserError: too many are bad (`BuildOptions.max_bad`).
    """
    numbers = range(len(shards))
    duplicates = repeated_ids.find_repeated([root / shard_file("ids", i, "npy") for i in numbers])
    rows = [shard.rows for shard in shards]
    stored = corpus_reader.StoredDocuments(root, rows, corpus_shard.record_format(tokenizer))
    rejects = [stream.Reject(*fields) for mark in marks for fields in mark["rejects"]]
    rejects += [document_checks.duplicate(found.id) for found in stored.read(duplicates)]
    if rejects and options.max_bad == 0:
        raise UserError(f"{rejects[0].name}: {rejects[0].detail}")
    (root / ingest_report.REJECTS).unlink(missing_ok=True)  # Of an attempt that failed.
    ingest_report.write_counts(
        root,
        sum(rows) - len(duplicates),
        rejects,
        options.max_bad,
        excluded={},
        notes=ingest_report.sum_counts([mark["notes"] for mark in marks]),
    )
    files.write_array(root / corpus_manifest.DUPLICATES, duplicates)
    return len(duplicates)


def _carry(source: Path, target: Path) -> None:
    """Copies the tokenizer's folder."""
    shutil.rmtree(target, ignore_errors=True)
    with files.whole_folder(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
