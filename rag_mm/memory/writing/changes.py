"""Changes to a memory that embed nothing: rows taken out, taken over, and written anew."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.memory.store import manifest, shard_file
from rag_mm.memory.writing import staging, writer

Progress = Callable[[int, int], None]


def remove(
    root: Path,
    ids: Collection[str] = (),
    urls: Collection[str] = (),
    licenses: Collection[str] = (),
) -> None:
    """Makes the next version, without some documents; see `Memory.remove`."""
    with writer.next_version(root) as (before, _):
        live = shard_file.load_live(root, before)
        found = _find(root, before, live.mask, set(ids), set(urls), set(licenses))
        removed = np.union1d(live.removed, found)
        dropped = f"{before.folder}/{manifest.REMOVED}"
        after = dataclasses.replace(
            before,
            version=before.version + 1,
            removed=len(removed),
            indexed_by=before.indexed_by or before.folder,
            files={name: entry for name, entry in before.files.items() if name != dropped},
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
    """Makes the next version, with the documents of another memory; see `Memory.merge`."""
    version, other_sha256 = manifest.read_current(other)
    theirs = manifest.read(other, version, other_sha256)
    with writer.next_version(root) as (before, sha256):
        for name in ("encoder", "tokenizer", "image_size"):
            mine, given = getattr(before, name), getattr(theirs, name)
            if mine != given:
                raise UserError(
                    f"{other} has {name} {given} and {root} has {mine}: memories of one retriever "
                    "and one tokenizer can be merged, others must be built anew."
                )
        live = shard_file.load_live(root, before)
        known = {shard_file.load_ids(root, before)[place] for place in live.stored}
        new = shard_file.load_ids(other, theirs)
        for place in shard_file.load_live(other, theirs).stored:
            if new[place] in known:
                raise UserError(f"Both memories have the id {new[place]!r}: remove it from one.")
        plan = {"what": "merge", "before": sha256, "other": other_sha256, "shard_size": shard_size}
        stage = staging.Staging(root, before, plan)
        _copy(stage, root, other, theirs, shard_size, on_progress)
        writer.finish(root, before, stage, None, live.removed)


def compact(
    root: Path,
    prune: bool = False,
    shard_size: int = 8192,
    on_progress: Progress | None = None,
) -> None:
    """Makes the next version, with nothing but the rows that are left; see `Memory.compact`."""
    if prune and (root / "manifest.json").exists():
        raise UserError(
            f"{root} is a run's own memory, whose stages read earlier versions: compact it unpruned."
        )
    with writer.next_version(root) as (before, sha256):
        plan = {"what": "compact", "before": sha256, "shard_size": shard_size}
        stage = staging.Staging(root, before, plan)
        _copy(stage, root, root, before, shard_size, on_progress)
        carried = {
            name: entry
            for name, entry in before.files.items()
            if manifest.version_of(name.split("/")[0]) is None
        }
        bare = dataclasses.replace(before, shards=(), files=carried, num_codes=None)
        writer.finish(root, bare, stage, None, np.zeros(0, np.int64))
        if prune:
            _prune(root, before.version)


def _find(
    root: Path,
    contents: manifest.MemoryManifest,
    mask: np.ndarray,
    ids: set[str],
    urls: set[str],
    licenses: set[str],
) -> np.ndarray:
    """Places of the rows that are left and have one of these, int64 [M].

    Raises:
        UserError: nothing was asked for, or something that no document has.
    """
    if not ids | urls | licenses:
        raise UserError("Nothing to remove: name ids, urls or licences.")
    wanted = {"id": ids, "url": urls, "license": licenses}
    found, seen = [], set()
    names = shard_file.load_ids(root, contents)
    origins = [shard_file.load_origins(root, contents, shard) for shard in contents.shards]
    columns: dict[str, Sequence[str | None]] = {
        "id": names,
        "url": [url for one in origins for url in one.url],
        "license": [license for one in origins for license in one.license],
    }
    for place in np.flatnonzero(mask).tolist():
        has = {kind: values[place] for kind, values in columns.items()}
        hits = {(kind, has[kind]) for kind, values in wanted.items() if has[kind] in values}
        seen |= hits
        found += [place] if hits else []
    unseen = {(kind, value) for kind, values in wanted.items() for value in values} - seen
    for kind, value in sorted(unseen):
        raise UserError(f"{root} has no document with the {kind} {value!r}: nothing was removed.")
    return np.array(found, np.int64)


def _copy(
    stage: staging.Staging,
    root: Path,
    source: Path,
    contents: manifest.MemoryManifest,
    shard_size: int,
    on_progress: Progress | None,
) -> None:
    """Writes the rows that are left of a memory's version as shards, from the last commit on."""
    places = shard_file.load_live(source, contents).stored
    records = shard_file.Records(source, contents.shards)
    for start in range(stage.position, len(places), shard_size):
        chosen = places[start : start + shard_size]
        shard = shard_file.ShardWriter(root, stage.folder, len(stage.commits))
        shard.write(records[place] for place in chosen)
        stage.commit(staging.Commit(*shard.close(), position=start + len(chosen)))
        if on_progress is not None:
            on_progress(start + len(chosen), len(places))


def _prune(root: Path, newest: int) -> None:
    """Deletes the versions up to `newest`, later ones first: those name files of earlier ones."""
    for version in range(newest, 0, -1):
        folder = manifest.folder_of(version)
        if (root / folder).exists():
            # By one rename it is gone; what a kill leaves of it is no version any more.
            (root / folder).rename(root / f"{manifest.PRUNED}{folder}")
            writer.clear(root, [f"{manifest.PRUNED}{folder}"])
