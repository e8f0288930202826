"""What a memory's manifest may say: numbers and names of a stranger are checked before they are used."""

import pathlib
import re
from typing import TYPE_CHECKING, Any

from rag_mm.memory import model_protocols

if TYPE_CHECKING:
    from rag_mm.memory.store.manifest import MemoryManifest, Shard

MAX_VERSION = 999_999
_MAX_ROWS = (1 << 31) - 1  # Rows are int32.
_MAX_BYTES = 1 << 50
_BOUNDS = {"version": (1, MAX_VERSION), "dim": (1, 1 << 16), "image_size": (1, 1 << 14)}
_MAX_CODES = 1 << 20
_VERSION = re.compile(r"v\d{6}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check(contents: "MemoryManifest") -> None:
    """Checks every field of a manifest.

    Raises:
        ValueError: a value has another type than it should have, is out of range, leads outside of the
            memory, or contradicts the sizes of the listed files.
    """
    for name, (low, high) in _BOUNDS.items():
        _integer(name, getattr(contents, name), low, high)
    for name in ("index", "encoder", "indexed_by"):
        _text(name, getattr(contents, name))
    if contents.tokenizer is not None:
        _text("tokenizer", contents.tokenizer)
    if contents.num_codes is not None:
        _integer("num_codes", contents.num_codes, 1, _MAX_CODES)
    for tokenizer, count in contents.more_codes.items():
        _integer(f"more_codes of {tokenizer}", count, 1, _MAX_CODES)
    for name, entry in contents.files.items():
        _check_path(name)
        _integer(f"size of {name}", entry.size, 0, _MAX_BYTES)
        if not _SHA256.fullmatch(_text("sha256", entry.sha256)):
            raise ValueError(f"the digest of {name} is none")
    for shard in contents.shards:
        _check_shard(contents, shard)
    _integer("rows", contents.stored, 0, _MAX_ROWS)
    _integer("removed", contents.removed, 0, contents.stored)
    if contents.indexed_by and not _VERSION.fullmatch(contents.indexed_by):
        raise ValueError(f"indexed_by is {contents.indexed_by!r}, which is no version")


def _check_shard(contents: "MemoryManifest", shard: "Shard") -> None:
    if not _VERSION.fullmatch(_text("folder", shard.folder)):
        raise ValueError(f"a path leads outside: {shard.folder}")
    _integer("number", shard.number, 0, 99_999)
    _integer("rows", shard.rows, 1, _MAX_ROWS)
    for name in ("with_text", "with_image"):
        _integer(name, getattr(shard, name), 0, shard.rows)
    # A claim of many rows must not fill the memory before the files are read.
    needed = {
        shard.file("ids", "json"): len('"",') * shard.rows,
        shard.file("records", "arrayrecord"): 1,
    }
    for view in model_protocols.VIEWS:
        needed[shard.file(f"embeddings-{view}", "npy")] = shard.rows * contents.dim * 4
    for name, least in needed.items():
        if name not in contents.files or contents.files[name].size < least:
            raise ValueError(f"{name} is missing or too small for {shard.rows:,} rows")


def _check_path(name: str) -> None:
    path = pathlib.PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"a path leads outside: {name!r}")


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {str(value)[:40]}, not an integer from {low:,} to {high:,}")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {str(value)[:40]}, not a text")
    return value
