"""Changes to a memory's rows: remove, merge, compact, and codes of another image tokenizer."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.memory import model_protocols
from rag_mm.memory.store import manifest, record, shard_file
from rag_mm.memory.writing import record_codes, staging, writer

Progress = Callable[[int, int], None]
Change = Callable[[Iterable[record.Record]], Iterable[record.Record]]
_PICTURES_AT_ONCE = 256


def remove(
    root: Path,
    ids: Collection[str] = (),
    urls: Collection[str] = (),
    licenses: Collection[str] = (),
) -> None:
    """Writes the next version without some documents; see `Memory.remove`."""
    with writer.next_version(root) as (previous, _):
        live = shard_file.load_live(root, previous)
        matches = _find(root, previous, live.mask, set(ids), set(urls), set(licenses))
        removed = np.union1d(live.removed, matches)
        dropped = f"{previous.folder}/{manifest.REMOVED}"
        after = dataclasses.replace(
            previous,
            version=previous.version + 1,
            removed=len(removed),
            indexed_by=previous.indexed_by or previous.folder,
            files={name: entry for name, entry in previous.files.items() if name != dropped},
        )
        writer.clear(root, [after.folder])
        files.write_array(root / after.folder / manifest.REMOVED, removed.astype(np.int64))
        writer.publish(root, after)


def merge(
    root: Path,
    other: Path,
    shard_size: int = 8192,
    on_progress: Progress | None = None,
) -> None:
    """Writes the next version with the documents of another memory; see `Memory.merge`."""
    version, other_sha256 = manifest.read_current(other)
    other_contents = manifest.read(other, version, other_sha256)
    with writer.next_version(root) as (previous, sha256):
        for name in ("encoder", "tokenizer", "image_size"):
            ours, theirs = getattr(previous, name), getattr(other_contents, name)
            if ours != theirs:
                raise UserError(
                    f"{other} has {name} {theirs} and {root} has {ours}: only memories with the same "
                    "retriever, tokenizer and image size can be merged; build one of them again."
                )
        live = shard_file.load_live(root, previous)
        known_ids = {shard_file.load_ids(root, previous)[position] for position in live.stored}
        new_ids = shard_file.load_ids(other, other_contents)
        for position in shard_file.load_live(other, other_contents).stored:
            name = new_ids[position]
            if name in known_ids:
                raise UserError(f"Both memories have the id {name!r}: remove it from one of them.")
        plan = {"what": "merge", "before": sha256, "other": other_sha256, "shard_size": shard_size}
        stage = staging.Staging(root, previous, plan)
        _copy(stage, root, other, other_contents, shard_size, on_progress)
        writer.finish(root, previous, stage, None, live.removed, other_contents.more_codes)


def compact(
    root: Path,
    prune: bool = False,
    shard_size: int = 8192,
    on_progress: Progress | None = None,
) -> None:
    """Writes the next version with only the live rows; see `Memory.compact`."""
    if prune and (root / "manifest.json").exists():
        raise UserError(
            f"{root} is a run's own memory, whose stages read earlier versions: "
            "compact it without --prune."
        )
    with writer.next_version(root) as (previous, sha256):
        plan = {"what": "compact", "before": sha256, "shard_size": shard_size}
        _rewrite(root, previous, plan, on_progress)
        if prune:
            _prune(root, previous.version)


def add_codes(
    root: Path,
    tokenizer: model_protocols.ImageTokenizer,
    shard_size: int = 8192,
    on_progress: Progress | None = None,
) -> None:
    """Writes the next version with an image tokenizer's codes of all pictures; see `Memory.add_codes`."""
    with writer.next_version(root) as (previous, sha256):
        name = tokenizer.fingerprint
        plan = {"what": "codes", "before": sha256, "tokenizer": name, "shard_size": shard_size}
        fill = functools.partial(
            record_codes.fill_all, tokenizer=tokenizer, at_once=_PICTURES_AT_ONCE
        )
        _rewrite(root, previous, plan, on_progress, fill, [name])


def _rewrite(
    root: Path,
    previous: manifest.MemoryManifest,
    plan: Mapping[str, Any],
    on_progress: Progress | None,
    change: Change = lambda records: records,
    tokenizers: Collection[str] = (),
) -> None:
    """Writes the next version with the live rows alone, each changed, in new shards."""
    stage = staging.Staging(root, previous, plan)
    _copy(stage, root, root, previous, plan["shard_size"], on_progress, change)
    carried = {
        name: entry
        for name, entry in previous.files.items()
        if manifest.version_of(name.split("/")[0]) is None
    }
    tokenizers = [*previous.more_codes, *tokenizers]
    empty = dataclasses.replace(previous, shards=(), files=carried, num_codes=None, more_codes={})
    writer.finish(root, empty, stage, None, np.zeros(0, np.int64), tokenizers)


def _find(
    root: Path,
    contents: manifest.MemoryManifest,
    mask: np.ndarray,
    ids: set[str],
    urls: set[str],
    licenses: set[str],
) -> np.ndarray:
    """Stored positions of the live rows that have one of the ids, urls or licenses, int64 [M].

    Raises:
        UserError: no value was given, or no document has one of them.
    """
    if not ids | urls | licenses:
        raise UserError("Nothing to remove: give ids, urls or licenses.")
    requested = {"id": ids, "url": urls, "license": licenses}
    positions, matched = [], set()
    names = shard_file.load_ids(root, contents)
    origins = [shard_file.load_origins(root, contents, shard) for shard in contents.shards]
    columns: dict[str, Sequence[str | None]] = {
        "id": names,
        "url": [url for shard in origins for url in shard.url],
        "license": [license for shard in origins for license in shard.license],
    }
    for position in np.flatnonzero(mask).tolist():
        row = {field: values[position] for field, values in columns.items()}
        matches = {
            (field, row[field]) for field, values in requested.items() if row[field] in values
        }
        matched |= matches
        positions += [position] if matches else []
    unmatched = {
        (field, value) for field, values in requested.items() for value in values
    } - matched
    for field, value in sorted(unmatched):
        raise UserError(f"{root} has no document with the {field} {value!r}: nothing was removed.")
    return np.array(positions, np.int64)


def _copy(
    stage: staging.Staging,
    root: Path,
    source: Path,
    contents: manifest.MemoryManifest,
    shard_size: int,
    on_progress: Progress | None,
    change: Change = lambda records: records,
) -> None:
    """Writes the live rows of a memory's version, changed, as shards, resuming after the last commit."""
    positions = shard_file.load_live(source, contents).stored
    records = shard_file.Records(source, contents.shards)
    for start in range(stage.position, len(positions), shard_size):
        batch = positions[start : start + shard_size]
        shard = shard_file.ShardWriter(root, contents, stage.folder, len(stage.commits))
        shard.write(change(records[position] for position in batch))
        stage.commit(staging.Commit(*shard.close(), position=start + len(batch)))
        if on_progress is not None:
            on_progress(start + len(batch), len(positions))


def _prune(root: Path, newest: int) -> None:
    """Deletes the versions up to `newest`, latest first, because versions refer to files of earlier ones."""
    for version in range(newest, 0, -1):
        folder = manifest.folder_of(version)
        if (root / folder).exists():
            # One rename removes the version; what a killed deletion leaves is no longer a version.
            (root / folder).rename(root / f"{manifest.PRUNED}{folder}")
            writer.clear(root, [f"{manifest.PRUNED}{folder}"])
