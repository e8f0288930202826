"""The actions of `rag-mm memory` and their options."""

import argparse

from rag_mm.cli import process_args

_DOCUMENTS = (
    "a folder with captions.jsonl, .tar, .arrayrecord or .parquet files, one such file, tfds:NAME:SPLIT, "
    "or scenes:LEVEL/SPLIT[+SPLIT]/ROLE"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser(
        "build",
        help="build a memory from documents",
        description="Build a memory: check the documents, embed them with a retriever, index them.",
        epilog="example:\n  rag-mm memory build --documents=images --retriever=runs/quickstart --out=mem",
    )
    build.add_argument(
        "--retriever", required=True, metavar="RUN", help="run with a trained or imported retriever"
    )
    build.add_argument(
        "--tokenizer",
        metavar="RUN",
        help="run with a trained or imported image tokenizer, whose codes are stored (default: the "
        "retriever's run, if it has one)",
    )
    build.add_argument("--out", required=True, metavar="MEM", help="folder of the new memory")
    build.add_argument("--index", default="scann", help="index: scann (default), exact or device")
    _add_ingestion(build)
    process_args.add_arguments(
        build,
        "Several processes share the encoding. Start each with the same command and --out.",
    )
    ingest = actions.add_parser(
        "ingest", help="check documents and write them as ArrayRecord files, with Apache Beam"
    )
    ingest.add_argument("--documents", required=True, help=_DOCUMENTS)
    ingest.add_argument("--out", required=True, metavar="DIR", help="new folder to write")
    ingest.add_argument(
        "--records-per-file",
        type=int,
        default=8192,
        help="records per output file, except for .tar inputs (default: 8192)",
    )
    ingest.add_argument("--max-bad", type=float, default=0.01, help="as in build (default: 0.01)")
    ingest.add_argument(
        "--beam", metavar="OPTIONS", help="Beam pipeline options (default: two local processes)"
    )
    add = actions.add_parser("add", help="add documents, in a new version")
    add.add_argument("memory", metavar="MEM")
    _add_ingestion(add)
    remove = actions.add_parser("remove", help="remove documents, in a new version")
    remove.add_argument("memory", metavar="MEM")
    for name in ("id", "url", "license"):
        remove.add_argument(
            f"--{name}",
            action="append",
            default=[],
            help=f"remove documents with this {name}; repeatable",
        )
    merge = actions.add_parser("merge", help="add another memory's documents, in a new version")
    merge.add_argument("memory", metavar="MEM")
    merge.add_argument("other", metavar="OTHER")
    compact = actions.add_parser(
        "compact", help="rewrite without removed documents, in a new version"
    )
    compact.add_argument("memory", metavar="MEM")
    compact.add_argument("--prune", action="store_true", help="delete all earlier versions")
    add_codes = actions.add_parser(
        "add-codes",
        help="add the codes of an image tokenizer, in a new version",
        description="Encode every picture of a memory that has no codes of an image tokenizer yet.",
    )
    add_codes.add_argument("memory", metavar="MEM")
    add_codes.add_argument(
        "--tokenizer",
        metavar="RUN",
        help="run with a trained or imported image tokenizer (default: the memory's own)",
    )
    _add_image_batch(add_codes)
    search = actions.add_parser("search", help="search for documents")
    search.add_argument("memory", metavar="MEM")
    query = search.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", help="text query; default view: mixed")
    query.add_argument("--image", help="image query, a JPEG, PNG or WebP file; default view: image")
    query.add_argument(
        "--document", metavar="ID", help="use this document of the memory as the query"
    )
    search.add_argument("--view", help="embeddings to search: image, text or mixed")
    search.add_argument("-k", type=int, default=5, help="number of hits (default: 5)")
    search.add_argument("--html", metavar="FILE", help="also write the hits as a contact sheet")
    show = actions.add_parser("show", help="show a document: its segments and their codes")
    show.add_argument("memory", metavar="MEM")
    show.add_argument("--document", metavar="ID", required=True, help="id of the document")
    verify = actions.add_parser("verify", help="check every file; exit code 1 if one is damaged")
    verify.add_argument("memory", metavar="MEM")
    stats = actions.add_parser("stats", help="show what a memory holds")
    stats.add_argument("memory", metavar="MEM")


def _add_ingestion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--documents", required=True, help=_DOCUMENTS)
    parser.add_argument(
        "--max-bad",
        type=float,
        default=0.01,
        help="largest tolerated share of bad records; one is always tolerated unless 0 (default: 0.01)",
    )
    parser.add_argument(
        "--rejects", metavar="FILE", help="write the list of bad records here, also on failure"
    )
    parser.add_argument(
        "--exclude",
        metavar="DIR",
        help="exclude these documents and their near-duplicates, such as a test set",
    )
    parser.add_argument(
        "--dedup", action="store_true", help="leave out duplicates of a caption and image"
    )
    parser.add_argument(
        "--similarity",
        type=float,
        default=0.98,
        help="cosine similarity above which images are near-duplicates (default: 0.98)",
    )
    _add_image_batch(parser)


def _add_image_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-batch",
        type=int,
        metavar="N",
        help="images encoded at once, a power of two (default: 2 ** 18 pixels in all, at most 256 images)",
    )
