"""Writes memories: each call makes the next version, whole or not at all.

A version counts once CURRENT names it, and that is written last, atomically. What a killed writer
leaves behind is invisible to readers. The next writer goes on from it if it makes the same thing from
the same documents, and removes it otherwise.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rag_mm.core import files
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
    """Makes a memory in a folder that is not one yet; see `Memory.build`."""
    registry.make_index(options.index, options.scann)  # A missing ScaNN is found before the work.
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
    """Makes the next version of a memory; see `Memory.add`."""
    source = _open_source(documents)
    with next_version(root) as (before, sha256):
        if encoder.fingerprint != before.encoder:
            raise UserError(
                f"{root} was built by another retriever ({before.encoder[:12]}, not "
                f"{encoder.fingerprint[:12]}): their embeddings cannot stand together."
            )
        given = None if tokenizer is None else tokenizer.fingerprint
        if given != before.tokenizer:
            raise UserError(
                f"{root} holds codes of tokenizer {before.tokenizer}, but {given} is given: "
                "add with the tokenizer of its build."
            )
        registry.make_index(
            before.index, options.scann
        )  # A missing ScaNN is found before the work.
        _write_documents(root, before, sha256, source, encoder, tokenizer, options)


@contextlib.contextmanager
def next_version(root: Path) -> Iterator[tuple[manifest.MemoryManifest, str]]:
    """The one writer's turn: the current manifest and its digest.

    A mistake of the user removes what was begun; an interruption leaves it, to go on from.
    """
    with _lock(root):
        version, sha256 = manifest.read_current(root)
        before = manifest.read(root, version, sha256)
        begun = manifest.folder_of(version + 1)
        clear(root, [name for name in _unfinished(root, version) if name != begun])
        try:
            yield before, sha256
        except UserError:
            if manifest.read_current(root)[0] == version:
                clear(root, [begun])
            raise


def finish(
    root: Path,
    before: manifest.MemoryManifest,
    stage: staging.Staging,
    scann: ScannConfig | None,
    removed: np.ndarray,
) -> None:
    """Indexes the shards of `before` and of the stage, and switches to the version they make.

    Args:
        root: the memory.
        before: the manifest before, with the shards and files that are kept.
        stage: what was written.
        scann: how ScaNN searches; None as before.
        removed: places of the stored rows that are no longer there, int64 [M].
    """
    shards = [commit.shard for commit in stage.commits if commit.shard.rows]
    dropped = (f"{before.index_folder('')}", f"{before.folder}/{manifest.REMOVED}")
    kept = {n: e for n, e in before.files.items() if not n.startswith(dropped)}
    after = dataclasses.replace(
        before,
        version=before.version + 1,
        num_codes=_num_codes(root, before.num_codes, shards),
        shards=(*before.shards, *shards),
        files=kept | stage.files(),
        removed=len(removed),
        indexed_by="",
    )
    if scann is None and before.version:
        scann = registry.saved_scann(before.index, root / before.index_folder("image"))
    for view in model_protocols.VIEWS:
        searcher = registry.make_index(before.index, scann)
        searcher.build(shard_file.load_rows(root, after, view))
        searcher.save(root / after.folder / f"index-{view}")
    if len(removed):
        files.write_array(root / after.folder / manifest.REMOVED, removed.astype(np.int64))
    publish(root, after)


def publish(root: Path, after: manifest.MemoryManifest) -> None:
    """Seals what lies in a version's folder and is not listed yet, and switches to the version."""
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
    before: manifest.MemoryManifest,
    sha256: str,
    source: stream.RecordStream,
    encoder: model_protocols.Encoder,
    tokenizer: model_protocols.ImageTokenizer | None,
    options: Options,
) -> None:
    """Writes the version after `before` and switches to it."""
    ingestion = ingest.Ingest(root, before, encoder, tokenizer, options)
    stage = staging.Staging(root, before, ingestion.plan(source, sha256))
    ingestion.write(stage, source)
    ingest_report.write(root / stage.folder, stage.commits, options.max_bad)
    removed = shard_file.load_live(root, before).removed
    finish(root, before, stage, options.scann, removed)


def _num_codes(root: Path, before: int | None, shards: Sequence[manifest.Shard]) -> int | None:
    """Codes of one image, which every shard agrees on; None where no image has any."""
    lengths = {before} if before is not None else set()
    for shard in shards:
        path = root / shard.file("codes", "npy")
        if path.exists():
            lengths.add(int(np.load(path, mmap_mode="r").shape[1]))
    if len(lengths) > 1:
        raise ValueError(f"the tokenizer gave images of {sorted(lengths)} codes")
    return lengths.pop() if lengths else None


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
    """One writer at a time; a killed one lets go by itself.

    Raises:
        UserError: the folder cannot be written, or another process writes into it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = (root / manifest.LOCK).open("ab")
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror or error}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"Another process is writing {root}: try again when it ends.") from None
        try:
            yield
        except OSError as error:
            raise UserError(f"{root} cannot be written: {error}.") from error


def check_vacant(root: Path, carried: Sequence[str]) -> None:
    """Raises UserError where a build would touch what no build of a memory has made."""
    if (root / manifest.CURRENT).exists():
        raise UserError(f"{root} is a memory already: add to it, or name another folder.")
    if not (root / manifest.LOCK).exists():
        for name in (manifest.folder_of(1), *carried):
            if (root / name).exists():
                raise UserError(f"{root / name} is in the way: name another folder.")


def _unfinished(root: Path, version: int) -> list[str]:
    """Versions after the current one, cut-short switches, half-deleted versions: a killed writer's."""
    starts = (f".{manifest.CURRENT}.", manifest.PRUNED)
    return [
        name
        for name in os.listdir(root)
        if (manifest.version_of(name) or 0) > version or name.startswith(starts)
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
    """Copies a folder's files to MEM/name and measures them."""
    if not source.is_dir():
        raise UserError(f"{source} is not a folder: it should hold the {name}'s weights.")
    entries = {}
    for path in sorted(source.rglob("*")):
        if path.is_file():
            target = root / name / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            entries[target.relative_to(root).as_posix()] = manifest.seal(target)
    return entries
