"""Writes memories: `build` makes version 1 and `add` the next one, each whole or not at all.

A version counts once CURRENT names it, and that is written last, atomically. What a killed writer
leaves behind is invisible to readers and removed by the next writer.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from rag_mm.core import document as document_lib
from rag_mm.core.errors import UserError
from rag_mm.memory import encoder as encoder_lib
from rag_mm.memory import images, kinds, manifest
from rag_mm.memory import shard as shard_lib
from rag_mm.memory.scann_index import ScannConfig


class Documents(Protocol):
    """Documents in an order, read one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> document_lib.Document: ...


@dataclasses.dataclass(frozen=True)
class Options:
    """How to write.

    Attributes:
        index: `scann` or `exact`; a memory keeps its kind.
        scann: how ScaNN searches, where it does.
        batch_size: documents encoded at once.
        shard_size: rows of one file; what is held in RAM beside the index's rows.
        on_progress: called with (documents done, all documents).
    """

    index: str = "scann"
    scann: ScannConfig | None = None
    batch_size: int = 256
    shard_size: int = 8192
    on_progress: Callable[[int, int], None] | None = None


def build(
    root: Path,
    documents: Documents,
    encoder: encoder_lib.Encoder,
    tokenizer: encoder_lib.Tokenizer | None,
    carried: Mapping[str, Path],
    options: Options,
) -> None:
    """Makes a memory in a folder that is not one yet; see `Memory.build`."""
    if len(documents) == 0:
        raise UserError("There are no documents: a memory needs at least one.")
    check_vacant(root, tuple(carried))
    is_new = not root.exists()
    with _lock(root):
        _clear(root, [manifest.folder_of(1), *carried])
        try:
            entries: dict[str, manifest.FileEntry] = {}
            for name, folder in carried.items():
                entries |= _copy_folder(folder, root, name)
            image_size = tokenizer.image_size if tokenizer is not None else encoder.image_size
            start = manifest.Manifest(
                version=0,
                dim=encoder.dim,
                image_size=image_size,
                index=options.index,
                encoder=encoder.fingerprint,
                tokenizer=None if tokenizer is None else tokenizer.fingerprint,
                num_codes=None,
                shards=(),
                files=entries,
            )
            _write_version(root, start, documents, encoder, tokenizer, options)
        except BaseException:
            if not (root / manifest.CURRENT).exists():
                _clear(root, [manifest.folder_of(1), *carried, manifest.LOCK])
                if is_new:
                    root.rmdir()
            raise


def add(
    root: Path,
    documents: Documents,
    encoder: encoder_lib.Encoder,
    tokenizer: encoder_lib.Tokenizer | None,
    options: Options,
) -> None:
    """Makes the next version of a memory; see `Memory.add`."""
    if len(documents) == 0:
        raise UserError("There are no documents to add.")
    with _lock(root):
        version, sha256 = manifest.read_current(root)
        before = manifest.read(root, version, sha256)
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
        _clear(root, _unfinished(root, version))
        try:
            _write_version(root, before, documents, encoder, tokenizer, options)
        except BaseException:
            if manifest.read_current(root)[0] == version:
                _clear(root, [manifest.folder_of(version + 1)])
            raise


def _write_version(
    root: Path,
    before: manifest.Manifest,
    documents: Documents,
    encoder: encoder_lib.Encoder,
    tokenizer: encoder_lib.Tokenizer | None,
    options: Options,
) -> None:
    """Writes the version after `before` and switches to it."""
    kinds.make_index(before.index, options.scann)  # A missing ScaNN is found before the work.
    folder = manifest.folder_of(before.version + 1)
    (root / folder).mkdir()
    shards = _write_shards(root, before, documents, encoder, tokenizer, options)
    after = dataclasses.replace(
        before,
        version=before.version + 1,
        num_codes=_num_codes(root, before, shards),
        shards=(*before.shards, *shards),
    )
    for view in encoder_lib.VIEWS:
        searcher = kinds.make_index(before.index, options.scann)
        rows = shard_lib.load_rows(root, after, view)
        if before.shards:
            searcher.load(root / before.folder / f"index-{view}", rows[: before.rows])
            searcher.add(rows[before.rows :])
        else:
            searcher.build(rows)
        searcher.save(root / folder / f"index-{view}")
    kept = {n: e for n, e in before.files.items() if not n.startswith(f"{before.folder}/index-")}
    paths = sorted(path for path in (root / folder).rglob("*") if path.is_file())
    written = {path.relative_to(root).as_posix(): manifest.seal(path) for path in paths}
    after = dataclasses.replace(after, files={**kept, **written})
    manifest.switch(root, after.version, manifest.write(root, after))


def _write_shards(
    root: Path,
    before: manifest.Manifest,
    documents: Documents,
    encoder: encoder_lib.Encoder,
    tokenizer: encoder_lib.Tokenizer | None,
    options: Options,
) -> list[manifest.Shard]:
    """Encodes the documents and writes them in shards of the version after `before`."""
    folder = manifest.folder_of(before.version + 1)
    known = set(shard_lib.load_ids(root, before))
    shards: list[manifest.Shard] = []
    for start in range(0, len(documents), options.shard_size):
        stop = min(start + options.shard_size, len(documents))
        writer = shard_lib.ShardWriter(root, folder, len(shards))
        for first in range(start, stop, options.batch_size):
            last = min(first + options.batch_size, stop)
            batch = [_prepare(documents[i], before.image_size, known) for i in range(first, last)]
            embeddings = encoder_lib.embed(batch, encoder, options.batch_size)
            codes: Sequence[np.ndarray | None] = [None] * len(batch)
            if tokenizer is not None:
                codes = encoder_lib.encode_codes(batch, tokenizer, options.batch_size)
            writer.write(batch, embeddings, codes, before.tokenizer)
            if options.on_progress is not None:
                options.on_progress(last, len(documents))
        shards.append(writer.close())
    return shards


def _num_codes(
    root: Path, before: manifest.Manifest, shards: Sequence[manifest.Shard]
) -> int | None:
    """Codes of one image, which every shard agrees on; None where no image has any."""
    lengths = {before.num_codes} if before.num_codes is not None else set()
    for shard in shards:
        path = root / shard.file("codes", "npy")
        if path.exists():
            lengths.add(int(np.load(path, mmap_mode="r").shape[1]))
    if len(lengths) > 1:
        raise ValueError(f"the tokenizer gave images of {sorted(lengths)} codes")
    return lengths.pop() if lengths else None


def _prepare(
    document: document_lib.Document, image_size: int, known: set[str]
) -> document_lib.Document:
    """The document with its pictures at the memory's size; `known` gains its id."""
    if not document.id:
        raise UserError("A document has an empty id: give every document one.")
    if document.id in known:
        raise UserError(f"Two documents have the id {document.id!r}: ids are unique in a memory.")
    known.add(document.id)
    segments = tuple(
        document_lib.Image(images.fit(segment.pixels, image_size))
        if isinstance(segment, document_lib.Image)
        else segment
        for segment in document.segments
    )
    return dataclasses.replace(document, segments=segments)


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
    """Versions after the current one, and a switch that was cut short: a killed writer's."""
    return [
        name
        for name in os.listdir(root)
        if (manifest.version_of(name) or 0) > version or name.startswith(f".{manifest.CURRENT}.")
    ]


def _clear(root: Path, names: Sequence[str]) -> None:
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
