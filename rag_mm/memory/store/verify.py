"""Integrity check of a memory's folder: every file, every row, and the recall of its indexes.

Each problem is reported as one sentence that names the file or view.
"""

import collections
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python import array_record_data_source
from etils import epath

from rag_mm.core import costs, files
from rag_mm.core.errors import UserError
from rag_mm.memory import model_protocols
from rag_mm.memory.index import protocol, registry
from rag_mm.memory.store import manifest, record, shard_file

_SAMPLE = 64
_RECALL_AT = 10
_MIN_RECALL = 0.95
_UNIT_TOLERANCE = 1e-3
# If a run's stage built the memory, these two files belong to the stage and may change.
_STAGE_FILES = ("manifest.json", costs.FILE_NAME)


def verify(path: epath.PathLike) -> list[str]:
    """Checks a memory and returns its problems; an empty list means that none were found.

    Compares every file of every version with its listed size and SHA-256, and reports files that no
    manifest lists. The two files of a run's stage in the folder must be valid JSON. Leftovers of a killed
    writer, which no reader sees, are not a problem. If all files are intact, checks the current version:
    row counts, NaN, unit length, duplicate ids, a sample of records against ids and embeddings, and each
    index's recall@10 on a sample against exact search.

    Raises:
        UserError: the folder does not exist or contains no file of a memory.
    """
    root = manifest.local_folder(path)
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: name one made by `memory build`.")
    if not any((root / name).exists() for name in (manifest.CURRENT, manifest.folder_of(1))):
        manifest.read_current(root)  # Raises with a suggested remedy.
    problems, current = _check_files(root)
    if current is not None and not problems:
        problems += _check_rows(root, current)
    if current is not None and not problems:
        problems += _check_recall(root, current)
    return problems


def _check_files(root: Path) -> tuple[list[str], manifest.MemoryManifest | None]:
    problems: list[str] = []
    current, version, sha256 = None, None, None
    try:
        version, sha256 = manifest.read_current(root)
    except UserError as error:
        problems.append(str(error))
    listed = {manifest.CURRENT, manifest.LOCK}
    unreadable = set()
    seen: dict[str, str | None] = {}
    for number in _versions(root, version):
        folder = manifest.folder_of(number)
        listed |= {f"{folder}/manifest.json", f"{folder}/manifest.sha256"}
        try:
            contents = manifest.read(root, number, sha256 if number == version else None)
        except UserError as error:
            problems.append(str(error))
            unreadable.add(folder)
            continue
        current = contents if number == version else current
        for name, entry in contents.files.items():
            if name not in seen:
                seen[name] = manifest.check_file(root, name, entry, deep=True)
    problems += [problem for problem in seen.values() if problem is not None]
    if version is not None and current is None and not problems:
        problems.append(f"{root / manifest.folder_of(version)} is missing.")
    problems += [
        problem
        for folder, problem in _check_unlisted(root, listed | set(seen), version)
        if folder not in unreadable
    ]
    return problems, current


def _versions(root: Path, current: int | None) -> list[int]:
    """Versions on disk up to and including the current one; later ones were never finished."""
    versions = {manifest.version_of(path.name) for path in root.iterdir()} | {current}
    return sorted(v for v in versions if v is not None and (current is None or v <= current))


def _check_unlisted(root: Path, listed: set[str], current: int | None) -> Iterator[tuple[str, str]]:
    """Files that no manifest lists: (top-level folder or file, problem)."""
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        name, top = relative.as_posix(), relative.parts[0]
        unfinished = current is not None and (manifest.version_of(top) or 0) > current
        is_leftover = top.startswith((f".{manifest.CURRENT}.", manifest.PRUNED))
        if path.is_dir() or name in listed or unfinished or is_leftover:
            continue
        if name in _STAGE_FILES:
            try:
                files.read_json(path)
            except UserError as error:
                yield top, str(error)
        else:
            yield top, f"{path} belongs to no version of the memory."


def _check_rows(root: Path, contents: manifest.MemoryManifest) -> list[str]:
    problems = []
    try:
        ids = shard_file.load_ids(root, contents)
        rows = {view: shard_file.load_rows(root, contents, view) for view in model_protocols.VIEWS}
        live = shard_file.load_live(root, contents)
    except UserError as error:
        return [str(error)]
    for name, count in collections.Counter(ids[position] for position in live.stored).items():
        if count > 1:
            problems.append(f"Id {name!r} occurs in {count} rows.")
    for view, values in rows.items():
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if bad.size:
            problems.append(f"View {view}: row {bad[0]} and {bad.size - 1} more hold NaN.")
            continue
        off = np.flatnonzero(np.abs(np.linalg.norm(values, axis=1) - 1) > _UNIT_TOLERANCE)
        if off.size:
            problems.append(
                f"View {view}: row {off[0]} and {off.size - 1} more do not have unit length."
            )
    return problems + list(_check_records(root, contents, ids, rows))


def _check_records(
    root: Path, contents: manifest.MemoryManifest, ids: list[str], rows: dict[str, np.ndarray]
) -> Iterator[str]:
    first = 0
    rng = np.random.default_rng(0)
    for shard in contents.shards:
        path = root / shard.file("records", "arrayrecord")
        try:
            codes = _all_codes(root, contents, shard)
            # Opened without a range, so that the number of records comes from the file.
            records = array_record_data_source.ArrayRecordDataSource(str(path))
            if len(records) != shard.rows:
                yield f"{path} holds {len(records)} records instead of {shard.rows}."
                continue
            for position in _sample(rng, shard.rows):
                stored = record.from_bytes(records[int(position)])
                row = first + int(position)
                if not _matches(stored, ids[row], {view: rows[view][row] for view in rows}):
                    yield f"Row {row}: the record does not match its id and embeddings."
                for tokenizer, values in codes.items():
                    if not _has_codes(stored, tokenizer, values[int(position)]):
                        yield f"Row {row}: the record does not match its codes."
        except (RuntimeError, UserError) as error:
            yield f"{path} cannot be read ({error})."
        first += shard.rows


def _matches(stored: record.Record, name: str, vectors: dict[str, np.ndarray]) -> bool:
    return (
        stored.document.id == name
        and set(stored.embeddings) == set(vectors)
        and all(np.array_equal(stored.embeddings[view], vectors[view]) for view in vectors)
    )


def _all_codes(
    root: Path, contents: manifest.MemoryManifest, shard: manifest.Shard
) -> dict[str, np.ndarray]:
    """A shard's codes by tokenizer, int32 [rows, N]."""
    tokenizers = [] if contents.tokenizer is None else [contents.tokenizer]
    codes = {
        name: shard_file.load_codes(root, contents, shard, name)
        for name in [*tokenizers, *contents.more_codes]
    }
    return {name: values for name, values in codes.items() if values is not None}


def _has_codes(stored: record.Record, tokenizer: str, codes: np.ndarray) -> bool:
    found = stored.first_codes(tokenizer)
    if found is None:
        return bool((codes == protocol.MISSING).all())
    return np.array_equal(found, codes)


def _check_recall(root: Path, contents: manifest.MemoryManifest) -> Iterator[str]:
    """Checks each index's recall against exact search over the same rows, with sampled rows as queries."""
    if contents.index == "exact":
        return
    live = shard_file.load_live(root, contents)
    queries = live.stored[np.sort(_sample(np.random.default_rng(0), len(live)))]
    k = min(_RECALL_AT, len(live))
    for view in model_protocols.VIEWS if k else ():
        rows = shard_file.load_rows(root, contents, view)
        searcher, oracle = registry.make_index(contents.index), registry.make_index("exact")
        try:
            searcher.load(root / contents.index_folder(view), rows)
        except UserError as error:
            yield str(error)
            continue
        oracle.build(rows)
        for built in (searcher, oracle):
            built.remove(live.removed)
        hits = searcher.search(rows[queries], k)
        expected = oracle.search(rows[queries], k)
        # Compares scores, because any of several equal rows is correct. The scores are recomputed in
        # float32, because some indexes round theirs.
        exact_scores = np.einsum("qkd,qd->qk", rows[live.stored[hits.ids]], rows[queries])
        is_correct = exact_scores >= expected.scores[:, -1:] - 1e-5
        recall = float((is_correct & (hits.ids != protocol.MISSING)).mean())
        if recall < _MIN_RECALL:
            yield f"View {view}: recall@{k} against exact search is {recall:.3f} < {_MIN_RECALL}."


def _sample(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.permutation(size)[:_SAMPLE]
