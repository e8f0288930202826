"""Turns documents into shards: checks, resizes, embeds and filters them, and commits shard by shard."""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rag_mm.core import document_types
from rag_mm.core.errors import UserError
from rag_mm.memory import model_protocols
from rag_mm.memory.index.scann_config import ScannConfig
from rag_mm.memory.store import manifest, record, shard_file
from rag_mm.memory.writing import (
    document_checks,
    near_duplicates,
    record_codes,
    staging,
    stream,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a build or an addition.

    Attributes:
        index: `scann`, `exact` or `device`; fixed when the memory is built.
        scann: settings of a `scann` index.
        batch_size: documents handed to the retriever together, and pictures handed to the image tokenizer;
            fewer documents if they have more pictures than that.
        shard_size: rows per shard. One shard is held in memory, in addition to the index's rows.
        on_progress: called with (records read, total records); an unknown total is the number read so far.
        max_bad: if a larger share of the records is bad, nothing is written; a single bad record is always
            tolerated, except with 0, which fails at the first bad record.
        exclude: documents that must not enter the memory.
        dedup: skips a document if an earlier one has the same text and an image with at least this cosine;
            None keeps duplicates.
    """

    index: str = "scann"
    scann: ScannConfig | None = None
    batch_size: int = 256
    shard_size: int = 8192
    on_progress: Callable[[int, int], None] | None = None
    max_bad: float = 0.0
    exclude: near_duplicates.ExclusionSet | None = None
    dedup: float | None = None


@dataclasses.dataclass
class _Draft:
    """A shard that is being written."""

    number: int
    position: int
    batch: list[document_types.Document] = dataclasses.field(default_factory=list)
    batch_notes: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    batch_pictures: int = 0
    writer: shard_file.ShardWriter | None = None
    rejects: list[stream.Reject] = dataclasses.field(default_factory=list)
    excluded: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    notes: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def rows(self) -> int:
        return 0 if self.writer is None else self.writer.rows


class Ingest:
    """Writes the shards of one version from one source."""

    def __init__(
        self,
        root: Path,
        previous: manifest.MemoryManifest,
        encoder: model_protocols.Encoder,
        tokenizer: model_protocols.ImageTokenizer | None,
        options: Options,
    ):
        """Prepares the version after `previous`; loads the ids and captions that must not occur again."""
        self._root = root
        self._previous = previous
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._options = options
        live = shard_file.load_live(root, previous)
        ids = shard_file.load_ids(root, previous)
        self._known_ids = {ids[position] for position in live.stored}
        self._duplicates = None
        if options.dedup is not None:
            self._duplicates = near_duplicates.DuplicateFilter(options.dedup)
            self._register(
                previous.shards, live.mask, shard_file.load_rows(root, previous, "image")
            )

    def plan(self, source: stream.RecordStream, sha256: str) -> dict[str, Any]:
        """Everything that the shards depend on; `sha256` is the digest of the previous manifest."""
        options = self._options
        return {
            "what": "documents",
            "before": sha256,
            "source": source.fingerprint,
            "encoder": self._encoder.fingerprint,
            "tokenizer": None if self._tokenizer is None else self._tokenizer.fingerprint,
            "image_size": self._previous.image_size,
            "index": self._previous.index,
            "shard_size": options.shard_size,
            "exclude": None if options.exclude is None else options.exclude.fingerprint,
            "dedup": options.dedup,
        }

    def write(self, stage: staging.Staging, source: stream.RecordStream) -> None:
        """Reads the source to its end, resuming after the last commit.

        Raises:
            UserError: a bad record with `max_bad` 0, or a non-finite embedding.
        """
        for commit in stage.commits:
            self._restore(commit)
        items = source.read(stage.position)
        done = sum(_num_records(commit) for commit in stage.commits)
        while True:
            draft = _Draft(len(stage.commits), stage.position)
            self._fill(draft, items, stage.folder, done, source.size)
            if draft.position == stage.position:
                return
            commit = _commit(draft, stage.folder)
            done += _num_records(commit)
            stage.commit(commit)

    def _fill(
        self,
        draft: _Draft,
        items: Iterator[stream.Item],
        folder: str,
        done: int,
        size: int | None,
    ) -> None:
        """Reads until the shard is full or the source ends."""
        for item in items:
            draft.position = item.position
            self._take(item, draft)
            remaining = self._options.shard_size - draft.rows
            is_full = len(draft.batch) == min(self._options.batch_size, remaining)
            if is_full or draft.batch_pictures >= self._options.batch_size:
                self._flush(draft, folder)
                if self._options.on_progress is not None:
                    read = done + draft.rows + len(draft.rejects) + draft.excluded.total()
                    self._options.on_progress(read, read if size is None else size)
            if draft.rows == self._options.shard_size:
                return
        if draft.batch:
            self._flush(draft, folder)

    def _take(self, item: stream.Item, draft: _Draft) -> None:
        """Adds a good document to the batch, or a bad record to the rejects."""
        reject = item.reject
        if item.document is not None:
            name = item.document.id
            is_known = name in self._known_ids or any(name == other.id for other in draft.batch)
            reject = document_checks.find_problem(item.document, is_known)
        if reject is None and item.document is not None:
            draft.batch.append(document_checks.fit(item.document, self._previous.image_size))
            draft.batch_pictures += len(draft.batch[-1].pictures)
            draft.batch_notes.append(item.notes)
        elif reject is not None:
            if self._options.max_bad == 0:
                # A source's detail lacks the subject of its sentence; that of `find_problem` has one.
                has_subject = reject is not item.reject
                raise UserError(reject.detail if has_subject else f"{reject.name}: {reject.detail}")
            draft.rejects.append(reject)

    def _flush(self, draft: _Draft, folder: str) -> None:
        """Embeds the batch and writes the documents that no filter excludes."""
        embeddings = model_protocols.embed(draft.batch, self._encoder)
        kept = []
        for i, reason in enumerate(self._filter(draft.batch, embeddings)):
            if reason is None:
                kept.append(i)
            else:
                draft.excluded.update([reason])
        batch = [draft.batch[i] for i in kept]
        records = [
            record.Record(document, {view: rows[i] for view, rows in embeddings.items()})
            for i, document in zip(kept, batch, strict=True)
        ]
        if self._tokenizer is not None:
            records = record_codes.fill(records, self._tokenizer, self._options.batch_size)
        if records:
            draft.writer = draft.writer or shard_file.ShardWriter(
                self._root, self._previous, folder, draft.number
            )
            draft.writer.write(records)
        self._known_ids.update(document.id for document in batch)
        draft.notes.update(note for i in kept for note in draft.batch_notes[i])
        draft.batch, draft.batch_notes, draft.batch_pictures = [], [], 0

    def _filter(
        self, batch: list[document_types.Document], embeddings: dict[str, np.ndarray]
    ) -> Iterator[str | None]:
        """Why each document is excluded, or None."""
        reasons: list[str | None] = [None] * len(batch)
        if self._options.exclude is not None:
            reasons = self._options.exclude.reasons(batch, embeddings)
        for document, embedding, reason in zip(batch, embeddings["image"], reasons, strict=True):
            if reason is None and self._duplicates is not None:
                caption = shard_file.caption_hash(document.text)
                if self._duplicates.is_duplicate(caption, embedding):
                    reason = "near-duplicate"
                else:
                    self._duplicates.add([caption], [embedding])
            yield reason

    def _restore(self, commit: staging.Commit) -> None:
        """Restores the known ids and captions from a commit of an earlier attempt."""
        if commit.shard.rows == 0:
            return
        contents = dataclasses.replace(
            self._previous, shards=(commit.shard,), files=commit.files, removed=0
        )
        self._known_ids.update(shard_file.load_ids(self._root, contents))
        if self._duplicates is not None:
            rows = shard_file.load_rows(self._root, contents, "image")
            self._register((commit.shard,), np.ones(len(rows), bool), rows, contents)

    def _register(
        self,
        shards: tuple[manifest.Shard, ...],
        mask: np.ndarray,
        rows: np.ndarray,
        contents: manifest.MemoryManifest | None = None,
    ) -> None:
        """Registers stored rows with the duplicate filter."""
        assert self._duplicates is not None
        captions = [
            caption
            for shard in shards
            for caption in shard_file.load_origins(
                self._root, contents or self._previous, shard
            ).caption
        ]
        positions = np.flatnonzero(mask)
        self._duplicates.add([captions[position] for position in positions], rows[positions])


def _commit(draft: _Draft, folder: str) -> staging.Commit:
    shard = manifest.Shard(folder, draft.number, 0, 0, 0)
    files: dict[str, manifest.FileEntry] = {}
    if draft.writer is not None:
        shard, files = draft.writer.close()
    return staging.Commit(
        shard, files, draft.position, draft.rejects, dict(draft.excluded), dict(draft.notes)
    )


def _num_records(commit: staging.Commit) -> int:
    return commit.shard.rows + len(commit.rejects) + sum(commit.excluded.values())
