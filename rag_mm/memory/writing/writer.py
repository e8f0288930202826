"""Writes memories: each call atomically writes the next version.

A version is valid once CURRENT names it; CURRENT is written last, atomically. Readers never see what a killed
writer leaves behind. The next writer resumes from it if it has the same plan (operation, documents and
options), and deletes it otherwise.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rag_mm.core import files, locks
from rag_mm.core.errors import UserError
from rag_mm.memory import model_protocols
from rag_mm.memory.index import registry
from rag_mm.memory.index.scann_config import ScannConfig
from rag_mm.memory.store import manifest, shard_file
from rag_mm.memory.writing import ingest, ingest_report, staging, stream
from rag_mm.memory.writing.ingest import Options
from rag_mm.memory.writing.stream import Documents

__all__ = ["Documents", "Options", "add", "build", "check_vacant"]


def build(
    root: Path,
    documents: Documents | stream.RecordStream,
    encoder: model_protocols.Encoder,
    tokenizer: model_protocols.ImageTokenizer | None,
    carried: Mapping[str, Path],
    options: Options,
) -> None:
    """Builds a memory in a folder that is not a memory yet; see `Memory.build`."""
    registry.make_index(options.index, options.scann)  # Fails early if ScaNN is missing.
    source = _open_source(documents)
    check_vacant(root, tuple(carried))
    is_new = not root.exists()
    with _lock(root):
        clear(root, carried)
        try:
            entries: dict[str, manifest.FileEntry] = {}
            for name, folder in carried.items():
                entries |= _copy_folder(folder, root, name)
            start = manifest.MemoryManifest(
                version=0,
                dim=encoder.dim,
                image_size=(encoder if tokenizer is None else tokenizer).image_size,
                index=options.index,
                encoder=encoder.fingerprint,
                tokenizer=None if tokenizer is None else tokenizer.fingerprint,
                num_codes=None,
                shards=(),
                files=entries,
            )
            _write_documents(root, start, "", source, encoder, tokenizer, options)
        except UserError:
            if not (root / manifest.CURRENT).exists():
                clear(root, [manifest.folder_of(1), *carried, manifest.LOCK])
                if is_new:
                    root.rmdir()
            raise


def add(
    root: Path,
    documents: Documents | stream.RecordStream,
    encoder: model_protocols.Encoder,
    tokenizer: model_protocols.ImageTokenizer | None,
    options: Options,
) -> None:
    """Writes the next version of a memory; see `Memory.add`."""
    source = _open_source(documents)
    with next_version(root) as (previous, sha256):
        if encoder.fingerprint != previous.encoder:
            raise UserError(
                f"{root} was built by another retriever ({previous.encoder[:12]}, not "
                f"{encoder.fingerprint[:12]}): their embeddings are not comparable."
            )
        fingerprint = None if tokenizer is None else tokenizer.fingerprint
        if fingerprint != previous.tokenizer:
            raise UserError(
                f"{root} holds codes of tokenizer {previous.tokenizer}, but {fingerprint} is given: "
                "add with the tokenizer that the memory was built with."
            )
        registry.make_index(previous.index, options.scann)  # Fails early if ScaNN is missing.
        _write_documents(root, previous, sha256, source, encoder, tokenizer, options)


@contextlib.contextmanager
def next_version(root: Path) -> Iterator[tuple[manifest.MemoryManifest, str]]:
    """Holds the writer's lock; yields the current manifest and its digest.

    A UserError deletes the unfinished version; an interruption keeps it, so that it can be resumed.
    """
    with _lock(root):
        version, sha256 = manifest.read_current(root)
        previous = manifest.read(root, version, sha256)
        unfinished = manifest.folder_of(version + 1)
        clear(root, [name for name in _leftovers(root, version) if name != unfinished])
        try:
            yield previous, sha256
        except UserError:
            if manifest.read_current(root)[0] == version:
                clear(root, [unfinished])
            raise


def finish(
    root: Path,
    previous: manifest.MemoryManifest,
    stage: staging.Staging,
    scann: ScannConfig | None,
    removed: np.ndarray,
    tokenizers: Collection[str] = (),
) -> None:
    """Indexes the shards of `previous` and of the stage together, and switches to the new version.

    Args:
        root: the memory.
        previous: the manifest of the previous version, reduced to the shards and files that are kept.
        stage: the new shards.
        scann: settings of a `scann` index; None keeps the previous ones.
        removed: stored positions of removed rows, int64 [M].
        tokenizers: image tokenizers, in addition to those of `previous`, whose codes the new shards may hold.
    """
    shards = [commit.shard for commit in stage.commits if commit.shard.rows]
    dropped = (f"{previous.index_folder('')}", f"{previous.folder}/{manifest.REMOVED}")
    kept = {n: e for n, e in previous.files.items() if not n.startswith(dropped)}
    after = dataclasses.replace(
        previous,
        version=previous.version + 1,
        num_codes=_num_codes(root, previous, shards, previous.tokenizer),
        more_codes=_more_codes(root, previous, shards, tokenizers),
        shards=(*previous.shards, *shards),
        files=kept | stage.files(),
        removed=len(removed),
        indexed_by="",
    )
    if scann is None and previous.version:
        scann = registry.saved_scann(previous.index, root / previous.index_folder("image"))
    for view in model_protocols.VIEWS:
        searcher = registry.make_index(previous.index, scann)
        searcher.build(shard_file.load_rows(root, after, view))
        searcher.save(root / after.folder / f"index-{view}")
    if len(removed):
        files.write_array(root / after.folder / manifest.REMOVED, removed.astype(np.int64))
    publish(root, after)


def publish(root: Path, after: manifest.MemoryManifest) -> None:
    """Adds the files of a version's folder to its manifest, writes it, and switches to the version."""
    folder = root / after.folder
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    new = [p for p in paths if p.relative_to(root).as_posix() not in after.files]
    sealed = manifest.seal_all(root, (p for p in new if not p.name.startswith("manifest.")))
    after = dataclasses.replace(after, files={**after.files, **sealed})
    manifest.switch(root, after.version, manifest.write(root, after))


def _open_source(documents: Documents | stream.RecordStream) -> stream.RecordStream:
    if not isinstance(documents, stream.RecordStream) and len(documents) == 0:
        raise UserError("There are no documents: a memory needs at least one.")
    return stream.as_source(documents)


def _write_documents(
    root: Path,
    previous: manifest.MemoryManifest,
    sha256: str,
    source: stream.RecordStream,
    encoder: model_protocols.Encoder,
    tokenizer: model_protocols.ImageTokenizer | None,
    options: Options,
) -> None:
    """Ingests documents into the version after `previous` and switches to it."""
    ingestion = ingest.Ingest(root, previous, encoder, tokenizer, options)
    stage = staging.Staging(root, previous, ingestion.plan(source, sha256))
    ingestion.write(stage, source)
    ingest_report.write(root / stage.folder, stage.commits, options.max_bad)
    removed = shard_file.load_live(root, previous).removed
    finish(root, previous, stage, options.scann, removed)


def _more_codes(
    root: Path,
    previous: manifest.MemoryManifest,
    shards: Sequence[manifest.Shard],
    tokenizers: Collection[str],
) -> dict[str, int]:
    """`more_codes` of the version with these shards."""
    names = sorted({*previous.more_codes, *tokenizers} - {previous.tokenizer})
    found = {name: _num_codes(root, previous, shards, name) for name in names}
    return {name: number for name, number in found.items() if number is not None}


def _num_codes(
    root: Path,
    previous: manifest.MemoryManifest,
    shards: Sequence[manifest.Shard],
    tokenizer: str | None,
) -> int | None:
    """Codes per image of a tokenizer, equal in all shards; None if no image has codes."""
    if tokenizer is None:
        return None
    number = previous.codes_per_image(tokenizer)
    lengths = {number} if number is not None else set()
    for shard in shards:
        path = root / previous.code_file(shard, tokenizer)
        if path.exists():
            lengths.add(int(np.load(path, mmap_mode="r").shape[1]))
    if len(lengths) > 1:
        raise ValueError(f"the tokenizer returned different numbers of codes: {sorted(lengths)}")
    return lengths.pop() if lengths else None


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Locks the memory for one writer; the lock of a killed process is released by the system.

    Raises:
        UserError: the folder cannot be written, or another process is writing to it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = files.open_lock(root / manifest.LOCK)
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror or error}.") from error
    with file:
        try:
            if not locks.take(file, root, fcntl.flock):
                raise UserError(
                    f"Another process is writing {root}: try again when it has finished."
                )
            yield
        except OSError as error:
            raise UserError(f"{root} cannot be written: {error}.") from error


def check_vacant(root: Path, carried: Sequence[str]) -> None:
    """Raises UserError if a build would overwrite a memory, or files that no build created."""
    if (root / manifest.CURRENT).exists():
        raise UserError(f"{root} is a memory already: add to it, or name another folder.")
    if not (root / manifest.LOCK).exists():
        for name in (manifest.folder_of(1), *carried):
            if (root / name).exists():
                raise UserError(f"{root / name} is in the way: name another folder.")


def _leftovers(root: Path, version: int) -> list[str]:
    """What a killed writer left: versions after the current one, unfinished switches and deletions."""
    prefixes = (f".{manifest.CURRENT}.", manifest.PRUNED)
    return [
        name
        for name in os.listdir(root)
        if (manifest.version_of(name) or 0) > version or name.startswith(prefixes)
    ]


def clear(root: Path, names: Sequence[str] | Mapping[str, Path]) -> None:
    """Deletes files and folders of a memory."""
    for name in names:
        path = root / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _copy_folder(source: Path, root: Path, name: str) -> dict[str, manifest.FileEntry]:
    """Copies a folder's files to MEM/name; returns their sizes and digests."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: it should hold the weights of the {name}.")
    entries = {}
    for path in sorted(source.rglob("*")):
        if path.is_file():
            target = root / name / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            entries[target.relative_to(root).as_posix()] = manifest.seal(target)
    return entries
