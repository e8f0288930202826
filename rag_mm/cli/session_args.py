"""What the commands that ask a run have in common: arguments, documents by hand, pictures written."""

import argparse
import math
import os
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
import rich.console
import rich.table
import rich.text

from rag_mm.core import files
from rag_mm.core.document_types import Document
from rag_mm.core.errors import UserError

if TYPE_CHECKING:
    from rag_mm.api.session import Session


def add_arguments(parser: argparse.ArgumentParser, temperature: float, top_p: float) -> None:
    """Adds the run, the documents and the sampling arguments."""
    parser.add_argument("--workdir", required=True, metavar="RUN", help="a finished run")
    parser.add_argument(
        "--docs", type=int, default=2, metavar="K", help="documents to retrieve (default: 2)"
    )
    parser.add_argument(
        "--documents", metavar="DIR", help="read this folder's documents instead of retrieving"
    )
    parser.add_argument("--num", type=int, default=1, help="how many answers (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same answer (default: 0)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help="0 takes the likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=top_p,
        help="keep the likeliest tokens up to this probability (default: %(default)s)",
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    """Adds where pictures go."""
    parser.add_argument(
        "--out", required=True, metavar="PNG", help="with --num, a-0.png, a-1.png, ... beside it"
    )


def check_out(path: str) -> None:
    """Refuses a path that cannot take a picture, before any work is done.

    Raises:
        UserError: it does not end in .png, or its folder does not exist or cannot be written.
    """
    out = pathlib.Path(path)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out={path} is no PNG file; let it end in .png.")
    if not out.parent.is_dir():
        raise UserError(f"--out={path}: there is no folder {out.parent}; make it first.")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out={path}: the folder {out.parent} cannot be written.")
    if out.is_dir():
        raise UserError(f"--out={path} is a folder; name a file.")


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for the methods of a session.

    Raises:
        UserError: a number out of range, or --documents names no documents.
    """
    if args.seed < 0:
        raise UserError(f"--seed={args.seed} is negative; give 0 or more.")
    if args.docs < 0:
        raise UserError(f"--docs={args.docs} is negative; give 0 to read none.")
    if args.num < 1:
        raise UserError(f"--num={args.num} asks for nothing; give at least 1.")
    if not 0 <= args.temperature < math.inf:
        raise UserError(
            f"--temperature={args.temperature} is no number from 0 on; 0 takes the best."
        )
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p={args.top_p} is no probability; give more than 0 and at most 1.")
    return dict(
        docs=args.docs,
        documents=_open_documents(args.documents),
        num=args.num,
        seed=args.seed,
        temperature=args.temperature,
        top_p=args.top_p,
    )


def load_session(workdir: str) -> "Session":
    """A finished run, as these commands ask it.

    Raises:
        UserError: there is none, or it is an imported checkpoint.
    """
    from rag_mm.api import imported, session

    if imported.is_imported(workdir):
        raise UserError(
            f"{workdir} is an imported checkpoint, which this command cannot ask; "
            f'in Python, rag_mm.load("{workdir}") can.'
        )
    return session.load(workdir)


def save_pictures(out: str, images: np.ndarray) -> list[str]:
    """Writes PNG files atomically: `out` itself for one picture, numbered ones for several."""
    from rag_mm.core import image_files

    path = pathlib.Path(out)
    names = [path]
    if len(images) > 1:
        names = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(images))]
    for name, pixels in zip(names, images, strict=True):
        files.write_atomic(name, image_files.encode_png(pixels))
    return [str(name) for name in names]


def show_neighbors(result: dict[str, Any], console: rich.console.Console) -> None:
    """Says which documents were read, with url and licence."""
    if not result["neighbors"]:
        console.print("No documents were read.")
        return
    table = rich.table.Table(box=None, pad_edge=False)
    for name in ("document", "score", "text", "url", "license"):
        table.add_column(name)
    for found in result["neighbors"]:
        score = "by hand" if found["score"] is None else f"{found['score']:.3f}"
        cells = (found["id"], score, found["text"], found["url"], found["license"])
        table.add_row(*(rich.text.Text(cell or "-") for cell in cells))
    console.print(table)


def _open_documents(folder: str | None) -> list[Document]:
    if folder is None:
        return []
    from rag_mm.data import sources

    documents = sources.FolderDocuments(folder)
    return [documents[i] for i in range(len(documents))]
