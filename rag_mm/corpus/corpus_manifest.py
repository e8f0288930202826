"""What a corpus is: its manifest, written last, and the sources that it was made of.

CORPUS/manifest.json                        what the corpus holds; size and digest of each of its files
CORPUS/shards/records-00000.arrayrecord     one `TokenDocument` each
CORPUS/shards/segments-00000.npy            int32 [S, 3]: document in the shard, kind, number of ids
CORPUS/shards/ids-00000.npy                 uint64 [D]: hashes of the documents' ids
CORPUS/shards/commit-00000.json             marks a whole shard, with its counts and bad records
CORPUS/duplicates.npy                       int64: stored documents that have the id of an earlier one
CORPUS/ingest.json, rejects.jsonl           counts and bad records
CORPUS/tokenizer/                           the image tokenizer and its vocabulary
CORPUS/neighbors-MEMORY/                    neighbors in a memory
CORPUS/begun.json                           the plan of the command that made it
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rag_mm.core import files
from rag_mm.core.code_grids import Grids
from rag_mm.core.errors import UserError
from rag_mm.corpus import folder_parts
from rag_mm.corpus.token_record import TokenFormat
from rag_mm.memory.store import manifest

MANIFEST, TOKENIZER, DUPLICATES = "manifest.json", "tokenizer", "duplicates.npy"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class CorpusShard:
    """Consecutive stored documents in their own files.

    Attributes:
        rows: number of documents.
        with_text, with_image: how many of them have a text, an image or a frame of a video.
        text_ids, codes: number of ids in all their texts, and of codes in all their images.
    """

    rows: int
    with_text: int
    with_image: int
    text_ids: int
    codes: int


@dataclasses.dataclass(frozen=True)
class SourceEntry:
    """A source of documents: what named it, its fingerprint, and how many of the shards are its."""

    name: str
    fingerprint: str
    shards: int


@dataclasses.dataclass(frozen=True)
class CorpusManifest:
    """A corpus.

    Attributes:
        tokenizer: fingerprint of the image tokenizer.
        vocabulary: fingerprint of the text vocabulary, which includes the numbers of all ids.
        text_size, codebook_size: numbers of text ids and of codes.
        image_size: side in pixels that images were scaled to.
        grids: (rows, columns) of each grid of an image's codes, coarse to fine.
        shard_size: source records per shard, except for tars, which are a shard each.
        sources: in the order of the shards.
        shards: in document order.
        files: size and digest of each file but the tokenizer's, by path relative to the corpus.
        duplicates: number of stored documents that are left out, as they have the id of an earlier one.
        licenses: (license, number of stored documents), most frequent first; None for those without.
    """

    tokenizer: str
    vocabulary: str
    text_size: int
    codebook_size: int
    image_size: int
    grids: Grids
    shard_size: int
    sources: tuple[SourceEntry, ...]
    shards: tuple[CorpusShard, ...]
    files: Mapping[str, manifest.FileEntry]
    duplicates: int
    licenses: tuple[tuple[str | None, int], ...]

    @property
    def format(self) -> TokenFormat:
        """The integers of the records."""
        return TokenFormat(self.text_size, self.codebook_size)

    @property
    def stored(self) -> int:
        """Number of stored documents, including duplicates."""
        return sum(shard.rows for shard in self.shards)

    @property
    def documents(self) -> int:
        """Number of documents, without duplicates."""
        return self.stored - self.duplicates

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the documents and models, not of where they came from."""
        rows = {n: e.sha256 for n, e in self.files.items() if not n.endswith(".json")}
        return files.digest(files.canonical_json([self.tokenizer, rows]).encode())

    def write(self, root: Path) -> None:
        """Writes the manifest; from then on the folder is a corpus."""
        files.write_json(root / MANIFEST, {"format": FORMAT, **dataclasses.asdict(self)})


def shard_file(what: str, number: int, ending: str) -> str:
    """The path of one of a shard's files, relative to the corpus or the folder of neighbors."""
    return f"{folder_parts.SHARDS}/{what}-{number:05d}.{ending}"


def read(root: Path) -> CorpusManifest:
    """Reads a corpus's manifest and checks the size of every file.

    Raises:
        UserError: the folder is no corpus, unfinished, of another version, or a file of it was changed.
    """
    path = root / MANIFEST
    if not path.exists():
        raise UserError(
            f"{root} is an unfinished corpus; run `rag-mm corpus build` again."
            if (root / folder_parts.PLAN).exists()
            else f"{root} is not a corpus; name a folder made by `rag-mm corpus build`."
        )
    contents = _parse(path, files.read_object(path))
    for name, entry in contents.files.items():
        if problem := manifest.check_file(root, name, entry, deep=False):
            raise UserError(problem)
    return contents


def _parse(path: Path, fields: dict[str, Any]) -> CorpusManifest:
    if (version := fields.pop("format", None)) != FORMAT:
        raise UserError(f"{path} has format {version}, not {FORMAT}; build the corpus again.")
    try:
        return CorpusManifest(
            **{
                **fields,
                "grids": tuple((int(rows), int(columns)) for rows, columns in fields["grids"]),
                "sources": tuple(SourceEntry(**entry) for entry in fields["sources"]),
                "shards": tuple(CorpusShard(**shard) for shard in fields["shards"]),
                "files": {n: manifest.FileEntry(**entry) for n, entry in fields["files"].items()},
                "licenses": tuple((name, int(count)) for name, count in fields["licenses"]),
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); build the corpus again.") from error
