"""Statistics and fingerprint of one version of a memory."""

import collections
from pathlib import Path
from typing import Any

import numpy as np

from rag_mm.core import files
from rag_mm.memory import model_protocols
from rag_mm.memory.index import live_rows
from rag_mm.memory.store import manifest, shard_file
from rag_mm.memory.writing import ingest_report


def fingerprint(contents: manifest.MemoryManifest, live: live_rows.LiveRows) -> str:
    """SHA-256 of rows, models and settings; indexes are excluded because they can differ by machine."""
    shards = {
        shard.file(what, ending)
        for shard in contents.shards
        for what, ending in (
            ("records", "arrayrecord"),
            ("ids", "json"),
            ("codes", "npy"),
            *((f"embeddings-{view}", "npy") for view in model_protocols.VIEWS),
        )
    }
    rows = {n: e.sha256 for n, e in contents.files.items() if n in shards}
    fields: list[Any] = [contents.encoder, contents.tokenizer, contents.index, contents.image_size]
    fields.append(rows)
    if live.num_removed:
        fields.append(live.removed.tolist())
    return files.digest(files.canonical_json(fields).encode())


def summarize(
    root: Path, contents: manifest.MemoryManifest, live: live_rows.LiveRows
) -> dict[str, Any]:
    """The JSON-ready result of `Memory.stats`."""
    with_text, with_image = _count_modalities(root, contents, live)
    counts, _ = ingest_report.read(root, contents)
    return {
        "path": str(root),
        "version": contents.version,
        "rows": contents.rows,
        "removed": contents.removed,
        "with_text": with_text,
        "with_image": with_image,
        "shards": len(contents.shards),
        "bytes": sum(entry.size for entry in contents.files.values()),
        "index": contents.index,
        "views": list(model_protocols.VIEWS),
        "dim": contents.dim,
        "image_size": contents.image_size,
        "codes_per_image": contents.num_codes,
        "encoder": contents.encoder,
        "tokenizer": contents.tokenizer,
        "more_codes": dict(contents.more_codes),
        "fingerprint": fingerprint(contents, live),
        "last_ingest": counts or None,
    }


def count_licenses(
    root: Path, contents: manifest.MemoryManifest, live: live_rows.LiveRows
) -> dict[str | None, int]:
    """The number of documents by license, most frequent first; None for documents that name none."""
    origins = [shard_file.load_origins(root, contents, shard) for shard in contents.shards]
    stored = [license for shard in origins for license in shard.license]
    counts = collections.Counter(stored[position] for position in live.stored)
    return dict(counts.most_common())


def _count_modalities(
    root: Path, contents: manifest.MemoryManifest, live: live_rows.LiveRows
) -> tuple[int, int]:
    """The number of rows with text, and of rows with an image."""
    if not live.num_removed:
        return (
            sum(shard.with_text for shard in contents.shards),
            sum(shard.with_image for shard in contents.shards),
        )
    origins = [shard_file.load_origins(root, contents, shard) for shard in contents.shards]
    has_text = np.array([caption != "" for shard in origins for caption in shard.caption], bool)
    has_image = np.array([image for shard in origins for image in shard.image], bool)
    return int(has_text[live.mask].sum()), int(has_image[live.mask].sum())
