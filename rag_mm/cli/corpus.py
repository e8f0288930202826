"""`rag-mm corpus`: documents as text ids and image codes on disk, which training reads."""

import argparse
import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

import rich.console

from rag_mm.cli import memory, memory_show, process_args
from rag_mm.core import progress
from rag_mm.core.errors import UserError

if TYPE_CHECKING:
    from rag_mm.corpus.corpus_reader import TokenCorpus
    from rag_mm.corpus.search_neighbors import SearchOptions
    from rag_mm.memory.retrieval_memory import Memory
    from rag_mm.memory.writing.stream import RecordStream

_SOURCE = (
    "a folder with captions.jsonl, .tar, .arrayrecord or .parquet files, one such file, "
    "tfds:NAME:SPLIT, or scenes:LEVEL/SPLIT[+SPLIT]/ROLE"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser(
        "build",
        help="build a corpus from documents",
        description="Build a corpus: check the documents and encode them with an image tokenizer and its "
        "text vocabulary.",
        epilog="example:\n  rag-mm corpus build --documents=tars --tokenizer=runs/quickstart --out=corpus",
    )
    build.add_argument(
        "--documents", required=True, nargs="+", metavar="SRC", help=f"one or more of: {_SOURCE}"
    )
    build.add_argument(
        "--tokenizer", required=True, metavar="RUN", help="run with an image tokenizer"
    )
    build.add_argument("--out", required=True, metavar="CORPUS", help="folder of the new corpus")
    build.add_argument(
        "--shard-size",
        type=int,
        default=8192,
        help="records of a source per shard, except for tars, which are a shard each (default: 8192)",
    )
    build.add_argument(
        "--max-bad",
        type=float,
        default=0.01,
        help="largest tolerated share of bad records; one is always tolerated unless 0 (default: 0.01)",
    )
    build.add_argument(
        "--rejects", metavar="FILE", help="write the list of bad records here, also on failure"
    )
    build.add_argument(
        "--image-batch", type=int, metavar="N", help="images encoded at once, a power of two"
    )
    process_args.add_arguments(
        build, "Several processes share the shards. Start each with the same command and --out."
    )
    _add_neighbors(actions)
    stats = actions.add_parser("stats", help="show what a corpus holds")
    stats.add_argument("corpus", metavar="CORPUS")


def _add_neighbors(actions: Any) -> None:
    neighbors = actions.add_parser(
        "neighbors",
        help="find the neighbors of a corpus's documents in a memory",
        description="Find the neighbors of each document by its text and by its image. They are kept in the "
        "corpus, with the memory's documents as text ids and image codes.",
        epilog="example:\n  rag-mm corpus neighbors corpus --memory=mem --max-similarity=0.9",
    )
    neighbors.add_argument("corpus", metavar="CORPUS")
    neighbors.add_argument("--memory", required=True, metavar="MEM", help="memory to search")
    neighbors.add_argument(
        "--documents",
        nargs="+",
        metavar="SRC",
        help="the sources of the corpus, in order, if they were moved since it was built",
    )
    neighbors.add_argument(
        "--num-neighbors", type=int, default=2, help="neighbors of each query (default: 2)"
    )
    neighbors.add_argument(
        "--word-dropout",
        type=float,
        default=0.2,
        help="probability of dropping a word of a text query (default: 0.2)",
    )
    neighbors.add_argument(
        "--max-similarity",
        type=float,
        help="skip hits with a higher cosine to the query or to each other (default: no bound)",
    )
    neighbors.add_argument(
        "--max-equal-codes",
        type=float,
        default=1.0,
        help="skip hits with a larger share of codes equal to the query's image or to each other "
        "(default: 1, no bound)",
    )
    neighbors.add_argument("--seed", type=int, default=0, help="of the words dropped (default: 0)")
    process_args.add_arguments(
        neighbors, "Several processes share the shards. Start each with the same command."
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the chosen action; returns the statistics of the corpus."""
    return {"build": _build, "neighbors": _neighbors, "stats": _stats}[args.action](args)


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the result as a table."""
    memory_show.show(result, console)


def _build(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.corpus import write_corpus

    memory.check_share("max_bad", args.max_bad)
    memory.check_image_batch(args)
    if args.shard_size < 1:
        raise UserError(f"--shard-size is {args.shard_size}; give at least 1.")
    memory.check_tokenizer(args)
    process_args.check_arguments(args)
    out = pathlib.Path(args.out)
    write_corpus.check_vacant(out)
    if len(set(args.documents)) < len(args.documents):
        raise UserError("--documents names one source twice; name each once.")
    sources = {spec: memory.open_documents(spec) for spec in args.documents}
    # Join only after the checks above: a process that exits early would leave the others waiting.
    with process_args.joined(args):
        return _build_joined(args, out, sources)


def _build_joined(
    args: argparse.Namespace, out: pathlib.Path, documents: "dict[str, Any]"
) -> dict[str, Any]:
    import jax

    from rag_mm.corpus import write_corpus
    from rag_mm.memory.writing import ingest_report, stream

    tokenizer = memory.load_tokenizer(pathlib.Path(args.tokenizer), args.image_batch)
    sources = {spec: stream.as_source(source) for spec, source in documents.items()}
    total = sum(source.size or 0 for source in sources.values())
    with progress.track("documents", total) as bar:
        options = write_corpus.BuildOptions(
            shard_size=args.shard_size,
            max_bad=args.max_bad,
            on_progress=lambda done: bar.update(done * jax.process_count()),
        )
        try:
            write_corpus.build(out, sources, tokenizer, pathlib.Path(tokenizer.folder), options)
        except ingest_report.TooManyRejects as error:
            if args.rejects is not None:
                ingest_report.write_rejects(pathlib.Path(args.rejects), error.rejects)
            raise
    if jax.process_index():
        return {"process": jax.process_index()}
    counts, rejects = ingest_report.read_counts(out)
    if args.rejects is not None:
        ingest_report.write_rejects(pathlib.Path(args.rejects), rejects)
    return {
        **_stats(argparse.Namespace(corpus=out)),
        "rejected": [dataclasses.asdict(reject) for reject in rejects],
        "rejected_by_reason": counts["rejected"],
        "notes": counts["notes"],
    }


def _neighbors(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.corpus import corpus_reader, search_neighbors
    from rag_mm.memory import retrieval_memory
    from rag_mm.memory.writing import stream

    process_args.check_arguments(args)
    names = [field.name for field in dataclasses.fields(search_neighbors.SearchOptions)]
    options = search_neighbors.SearchOptions(**{name: getattr(args, name) for name in names})
    corpus = corpus_reader.TokenCorpus(args.corpus)
    specs = args.documents or [source.name for source in corpus.manifest.sources]
    sources = [stream.as_source(memory.open_documents(spec)) for spec in specs]
    found = retrieval_memory.Memory.open(args.memory)
    with process_args.joined(args):
        return _neighbors_joined(corpus, found, sources, options)


def _neighbors_joined(
    corpus: "TokenCorpus",
    found: "Memory",
    sources: "list[RecordStream]",
    options: "SearchOptions",
) -> dict[str, Any]:
    import jax

    from rag_mm.corpus import corpus_manifest, neighbor_rows, search_neighbors

    found.attach(memory.load_encoder(found.carried("retriever")))
    tokenizer = memory.load_tokenizer(corpus.path / corpus_manifest.TOKENIZER)
    with progress.track("documents", len(found) + corpus.manifest.stored) as bar:
        folder = search_neighbors.search(
            corpus,
            found,
            sources,
            tokenizer,
            options,
            on_progress=lambda done: bar.update(done * jax.process_count()),
        )
    if jax.process_index():
        return {"process": jax.process_index()}
    neighbors = neighbor_rows.NeighborRows(folder, corpus)
    return {
        "path": str(folder),
        "documents": len(corpus),
        "memory_documents": len(neighbors.documents),
        **neighbors.manifest.settings,
        **neighbors.manifest.figures,
    }


def _stats(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.corpus import corpus_reader, corpus_stats

    return corpus_stats.summarize(corpus_reader.TokenCorpus(args.corpus))
