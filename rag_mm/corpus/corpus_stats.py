"""What a corpus holds, as a JSON-ready dict."""

from typing import Any

from rag_mm.corpus.corpus_reader import TokenCorpus


def summarize(corpus: TokenCorpus) -> dict[str, Any]:
    """Sizes, models, sources and licenses of a corpus."""
    contents = corpus.manifest
    totals = {
        name: sum(getattr(shard, name) for shard in contents.shards)
        for name in ("with_text", "with_image", "text_ids", "codes")
    }
    return {
        "path": str(corpus.path),
        "documents": len(corpus),
        "duplicates": contents.duplicates,
        **totals,
        "shards": len(contents.shards),
        "bytes": sum(entry.size for entry in contents.files.values()),
        "image_size": contents.image_size,
        "grids": [list(grid) for grid in contents.grids],
        "tokenizer": contents.tokenizer,
        "vocabulary": contents.vocabulary,
        "sources": [source.name for source in contents.sources],
        "licenses": {name or "-": count for name, count in contents.licenses},
        "fingerprint": corpus.fingerprint,
    }
