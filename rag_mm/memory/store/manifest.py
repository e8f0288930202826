"""The files of a memory: its versions, their manifests, and the atomic switch between versions.

    MEM/CURRENT                     the current version and the digest of its manifest
    MEM/v000001/manifest.json       describes the version; size and digest of each of its files
    MEM/v000001/manifest.sha256     digest of the manifest
    MEM/v000001/{records,ids,origins,codes,embeddings-VIEW}-00000.*     one shard
    MEM/v000001/codes-TOKENIZER-00000.npy       codes of a further image tokenizer
    MEM/v000001/index-VIEW/         the index of a view, over all stored rows
    MEM/v000001/begun.json commit-00000.json        the plan of the writer, and the shards it finished
    MEM/v000001/removed.npy         positions of removed stored rows (tombstones)
    MEM/v000001/{ingest.json,rejects.jsonl}         counts and bad records of an ingestion
    MEM/retriever/ MEM/tokenizer/   the models, needed to search and to add documents

A version refers to files of its own folder and of earlier versions' folders, which are never changed.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from rag_mm.core import files, remote
from rag_mm.core.errors import UserError
from rag_mm.memory.store import manifest_checks

CURRENT = "CURRENT"
REMOVED = "removed.npy"
PRUNED = ".pruned-"  # Prefix of a version that is being deleted; readers and `verify` ignore it.
LOCK = ".memory-lock"  # A stage's folder can be a memory, and the run locks it under another name.
FORMAT = 2
_FORMATS = (1, FORMAT)  # Format 1 had no `more_codes`.
_CURRENT_LINE = re.compile(r"v(\d{6}) ([0-9a-f]{64})\n")


@dataclasses.dataclass(frozen=True)
class Shard:
    """Consecutive stored rows in their own files; `folder` is that of the version that wrote them."""

    folder: str
    number: int
    rows: int
    with_text: int
    with_image: int

    def file(self, what: str, ending: str) -> str:
        """The path of one of its files, relative to the memory."""
        return f"{self.folder}/{what}-{self.number:05d}.{ending}"


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and SHA-256 in hex."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class MemoryManifest:
    """One version of a memory.

    Attributes:
        version: 1, 2, ...
        dim: width of the embeddings.
        image_size: side of the stored images in pixels.
        index: kind of the indexes (`exact`, `scann` or `device`).
        encoder: fingerprint of the retriever.
        tokenizer: fingerprint of the image tokenizer, or None without codes.
        num_codes: codes per image, or None.
        more_codes: codes per image of each further image tokenizer, by its fingerprint.
        shards: in row order.
        files: all files that the version needs, by path relative to the memory.
        removed: number of stored rows that were removed.
        indexed_by: folder of the version whose indexes this one uses; empty for its own.
    """

    version: int
    dim: int
    image_size: int
    index: str
    encoder: str
    tokenizer: str | None
    num_codes: int | None
    shards: tuple[Shard, ...]
    files: Mapping[str, FileEntry]
    removed: int = 0
    indexed_by: str = ""
    more_codes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def codes_per_image(self, tokenizer: str | None) -> int | None:
        """Number of codes per image of an image tokenizer, by its fingerprint; None if it has none here."""
        if tokenizer is not None and tokenizer == self.tokenizer:
            return self.num_codes
        return None if tokenizer is None else self.more_codes.get(tokenizer)

    def code_file(self, shard: Shard, tokenizer: str) -> str:
        """The path of a shard's codes of an image tokenizer, relative to the memory."""
        if tokenizer == self.tokenizer:
            return shard.file("codes", "npy")
        return shard.file(f"codes-{files.digest(tokenizer.encode())[:16]}", "npy")

    @property
    def stored(self) -> int:
        """Number of stored rows, including removed ones."""
        return sum(shard.rows for shard in self.shards)

    @property
    def rows(self) -> int:
        """Number of rows, excluding removed ones."""
        return self.stored - self.removed

    @property
    def folder(self) -> str:
        """Name of the version's folder."""
        return folder_of(self.version)

    def index_folder(self, view: str) -> str:
        """Path of a view's index, relative to the memory."""
        return f"{self.indexed_by or self.folder}/index-{view}"


def local_folder(path: epath.PathLike) -> Path:
    """The path of a memory, which must be local: its files are memory-mapped, locked and read by native code.

    Raises:
        UserError: the path is remote.
    """
    if remote.is_remote(path):
        raise UserError(f"{path} is remote; build and open memories on a local disk.")
    return Path(path)


def folder_of(version: int) -> str:
    """`v000001` for 1.

    Raises:
        UserError: there are no more names.
    """
    if version > manifest_checks.MAX_VERSION:
        raise UserError(
            f"A memory has at most {manifest_checks.MAX_VERSION:,} versions; build it anew."
        )
    return f"v{version:06d}"


def version_of(folder: str) -> int | None:
    """1 for `v000001`; None if the name is not a version's."""
    return int(folder[1:]) if re.fullmatch(r"v\d{6}", folder) else None


def seal(path: Path) -> FileEntry:
    """Flushes a finished file to disk (fsync) and returns its size and digest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(path.stat().st_size, files.file_digest(path))


def seal_all(root: Path, paths: Iterable[Path]) -> dict[str, FileEntry]:
    """Seals files, by path relative to the memory."""
    return {path.relative_to(root).as_posix(): seal(path) for path in paths}


def write(root: Path, manifest: MemoryManifest) -> str:
    """Writes a version's manifest and digest file; returns the digest."""
    text = files.canonical_json({"format": FORMAT, **dataclasses.asdict(manifest)}) + "\n"
    sha256 = files.digest(text.encode())
    files.write_atomic(root / manifest.folder / "manifest.json", text.encode())
    line = _digest_line(sha256)
    files.write_atomic(root / manifest.folder / "manifest.sha256", line.encode())
    return sha256


def switch(root: Path, version: int, sha256: str) -> None:
    """Makes a version the current one, atomically: readers see either the old or the new version."""
    files.write_atomic(root / CURRENT, f"{folder_of(version)} {sha256}\n".encode())


def read_current(root: Path) -> tuple[int, str]:
    """The current version and its manifest's digest.

    Raises:
        UserError: the folder is not a memory, its build is unfinished, or CURRENT is damaged.
    """
    try:
        line = files.read_bytes(root / CURRENT).decode("utf-8", "replace")
    except OSError:
        remedy = (
            "its build was not finished; run `memory build` again"
            if (root / LOCK).exists()
            else "name a folder made by `memory build`"
        )
        raise UserError(f"{root} is not a memory, since it has no {CURRENT}: {remedy}.") from None
    match = _CURRENT_LINE.fullmatch(line)
    if match is None:
        raise UserError(f"{root / CURRENT} is damaged: it names no version.")
    return int(match[1]), match[2]


def read(root: Path, version: int, sha256: str | None = None) -> MemoryManifest:
    """Reads a version's manifest and checks it against its digest.

    Args:
        root: the memory.
        version: the version's number.
        sha256: the digest recorded in CURRENT, for the current version.

    Raises:
        UserError: the manifest is missing or was changed.
    """
    path = root / folder_of(version) / "manifest.json"
    try:
        data = files.read_bytes(path)
    except OSError as error:
        named = "" if sha256 is None else f"{root / CURRENT} names version {version}, but "
        raise UserError(f"{named}{path} cannot be read ({error.strerror}).") from error
    try:
        line = files.read_bytes(path.with_suffix(".sha256")).decode("utf-8", "replace")
    except OSError as error:
        raise UserError(f"{path.with_suffix('.sha256')} cannot be read.") from error
    actual = files.digest(data)
    if line == _digest_line(actual) and sha256 not in (None, actual):
        raise UserError(
            f"{root / CURRENT} or {path} was changed: the manifest's digest is not the recorded one."
        )
    if line != _digest_line(actual):
        raise UserError(
            f"{path} or the digest next to it, manifest.sha256, was changed: build the memory again."
        )
    try:
        return _parse(files.read_json(path))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest of this version of rag_mm ({error}).") from error


def check_file(root: Path, name: str, entry: FileEntry, deep: bool) -> str | None:
    """The problem with a listed file as one sentence, or None; `deep` also compares its digest."""
    path = root / name
    if not path.is_file():
        return f"{path} is missing."
    size = path.stat().st_size
    if size != entry.size:
        return f"{path} has {size} bytes instead of {entry.size}: it was truncated or changed."
    if deep and files.file_digest(path) != entry.sha256:
        return f"{path} was changed: its SHA-256 is not the one in the manifest."
    return None


def check_sizes(root: Path, manifest: MemoryManifest) -> None:
    """Raises UserError if a file of a version is missing or has the wrong size."""
    for name, entry in manifest.files.items():
        problem = check_file(root, name, entry, deep=False)
        if problem is not None:
            raise UserError(problem)


def check_folder(root: Path, manifest: MemoryManifest, folder: str) -> None:
    """Raises UserError if a version has no such folder, or a file in it was changed."""
    entries = {n: e for n, e in manifest.files.items() if n.startswith(f"{folder}/")}
    if not entries:
        raise UserError(f"{root} carries no {folder}: it was built without one.")
    for name, entry in entries.items():
        problem = check_file(root, name, entry, deep=True)
        if problem is not None:
            raise UserError(problem)


def _digest_line(sha256: str) -> str:
    return f"{sha256}  manifest.json\n"


def _parse(fields: Any) -> MemoryManifest:
    fields = dict(fields)
    if fields.pop("format") not in _FORMATS:
        raise ValueError(f"its format is none of {_FORMATS}")
    if not isinstance(fields["shards"], list):
        raise TypeError("its shards are no list")
    fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
    fields["files"] = {name: FileEntry(**entry) for name, entry in fields["files"].items()}
    contents = MemoryManifest(**fields)
    manifest_checks.check(contents)
    return contents
