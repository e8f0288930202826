"""Options and output that generate, edit, caption, ask and infill share: sampling, documents, PNG files."""

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


MAX_OUTPUTS = 4096
"""Of one command; all are kept in memory until the last is done."""


def add_arguments(
    parser: argparse.ArgumentParser,
    temperature: float,
    top_p: float,
    number: str = "number of outputs",
    docs: int = 2,
    stage: str = "decoder",
) -> None:
    """Adds --workdir, --stage, the document options and the sampling options.

    `number` says what --num counts; `docs` and `stage` are defaults.
    """
    parser.add_argument(
        "--docs",
        type=int,
        default=docs,
        metavar="K",
        help=f"number of documents to retrieve (default: {docs})",
    )
    parser.add_argument(
        "--documents",
        metavar="DIR",
        help="condition on this folder's documents instead of retrieving",
    )
    add_sampling(parser, temperature, top_p, number, stage)


def add_sampling(
    parser: argparse.ArgumentParser, temperature: float, top_p: float, number: str, stage: str
) -> None:
    """Adds --workdir, --stage, --mesh and the sampling options, for a command that reads no documents."""
    parser.add_argument("--workdir", required=True, metavar="RUN", help="finished run")
    add_mesh(parser)
    add_stage(parser, stage)
    parser.add_argument("--num", type=int, default=1, help=f"{number} (default: 1)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="sampling seed; the same seed gives the same output (default: 0)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        help="sampling temperature; 0 is greedy (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=top_p,
        help="nucleus sampling: keep the likeliest tokens of this total probability (default: %(default)s)",
    )


def add_steering(parser: argparse.ArgumentParser) -> None:
    """Adds the options of guidance and contrastive decoding (`api.steering_options`)."""
    group = parser.add_argument_group(
        "guidance and contrast (CM3Leon)",
        "With both, half of the candidates are made by each; give --best-of.",
    )
    add = group.add_argument
    add(
        "--guidance",
        type=float,
        metavar="W",
        help="move away from the null prompt: 1 is plain sampling, more guides, 0 samples the null prompt",
    )
    add(
        "--null",
        metavar="PROMPT",
        help="null prompt: bare, without caption and documents; documents; or caption, the caption without "
        "documents (default: bare)",
    )
    add(
        "--documents-guidance",
        type=float,
        metavar="W",
        help="weight of the documents where caption and documents guide separately; --guidance is then the "
        "caption's",
    )
    add(
        "--plausible",
        type=float,
        metavar="A",
        help="guide only among tokens of at least A times the largest probability (default: 0)",
    )
    add(
        "--contrast",
        type=int,
        metavar="K",
        help="contrastive decoding against the null prompt, among tokens of at least --contrast-alpha times "
        "the K-th largest probability",
    )
    add("--contrast-alpha", type=float, metavar="A", help="1 with K = 1 is greedy (default: 0.1)")
    add(
        "--amateur-temperature",
        type=float,
        metavar="T",
        help="temperature of the null prompt's distribution in the contrast (default: 1)",
    )
    add(
        "--contrast-floor",
        type=float,
        metavar="F",
        help="contrast only tokens of at least F times the largest probability (default: 0)",
    )


def steering(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments `guidance` and `contrast` of `Session.generate`.

    Raises:
        UserError: a value is out of range, or an option is given without the one that it changes.
    """
    from rag_mm.api import steering_options

    return steering_options.parse(vars(args))


def add_out(parser: argparse.ArgumentParser) -> None:
    """Adds --out."""
    parser.add_argument(
        "--out",
        required=True,
        metavar="PNG",
        help="output file; several images of a.png are named a-0.png, a-1.png, ...",
    )


def check_out(path: str, option: str = "--out") -> None:
    """Checks before any work is done that `path`, given as `option`, can be written as a PNG file.

    Raises:
        UserError: it does not end in .png, or its folder does not exist or cannot be written.
    """
    out = pathlib.Path(path)
    if out.suffix.lower() != ".png":
        raise UserError(f"{option}={path} is not a PNG file; give a name that ends in .png.")
    if not out.parent.is_dir():
        raise UserError(f"{option}={path}: there is no folder {out.parent}; create it first.")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{option}={path}: no permission to write to the folder {out.parent}.")
    if out.is_dir():
        raise UserError(f"{option}={path} is a folder; give a file.")


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments that `Session.generate`, `caption`, `ask` and `infill` share.

    Raises:
        UserError: a number is out of range, or the --documents folder holds no readable documents.
    """
    if args.docs < 0:
        raise UserError(f"--docs={args.docs} is negative; give 0 for no retrieval.")
    sampling = sampling_options(args)
    return dict(docs=args.docs, documents=_open_documents(args.documents), **sampling)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of them that sample: `num`, `seed`, `temperature` and `top_p`; UserError out of range."""
    if args.seed < 0:
        raise UserError(f"--seed={args.seed} is negative; give 0 or more.")
    if not 1 <= args.num <= MAX_OUTPUTS:
        raise UserError(f"--num is {args.num}; give 1 to {MAX_OUTPUTS:,}.")
    if not 0 <= args.temperature < math.inf:
        raise UserError(
            f"--temperature={args.temperature} is out of range; give a finite number of at least 0."
        )
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p={args.top_p} is out of range; give more than 0 and at most 1.")
    return dict(num=args.num, seed=args.seed, temperature=args.temperature, top_p=args.top_p)


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Adds --mesh."""
    parser.add_argument(
        "--mesh",
        type=int,
        nargs=3,
        metavar=("DATA", "FSDP", "TENSOR"),
        help="devices on which the decoder is loaded: the first two split the outputs made at once, the "
        "last its heads (default: 1 1 1)",
    )


def add_stage(parser: argparse.ArgumentParser, default: str = "decoder") -> None:
    """Adds --stage."""
    parser.add_argument(
        "--stage",
        default=default,
        metavar="NAME",
        help="stage whose decoder is used, such as decoder, or sft for the one tuned on instructions "
        f"(default: {default})",
    )


def load_session(args: argparse.Namespace, workdir: str) -> "Session":
    """Loads a finished run: the decoder of --stage, on --mesh.

    Raises:
        UserError: there is no finished run or stage, or it is an imported checkpoint.
    """
    from rag_mm.api import imported, session

    if imported.is_imported(workdir):
        raise UserError(
            f"{workdir} is an imported checkpoint, which this command does not support; "
            f'use it from Python: rag_mm.load("{workdir}").'
        )
    return session.load(workdir, args.mesh, args.stage)


def save_images(out: str, images: np.ndarray) -> list[str]:
    """Writes uint8 [N, H, W, 3] as PNG files, atomically: `out` for one image, STEM-i.png for several.

    Returns:
        The paths written.
    """
    from rag_mm.core import image_files

    path = pathlib.Path(out)
    names = [path]
    if len(images) > 1:
        names = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(images))]
    for name, pixels in zip(names, images, strict=True):
        files.write_atomic(name, image_files.encode_png(pixels))
    return [str(name) for name in names]


def show_neighbors(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the documents that the model read, with url and license."""
    if not result["neighbors"]:
        console.print("No documents were retrieved.")
        return
    table = rich.table.Table(box=None, pad_edge=False)
    for name in ("document", "score", "text", "url", "license"):
        table.add_column(name)
    for document in result["neighbors"]:
        score = "given" if document["score"] is None else f"{document['score']:.3f}"
        cells = (document["id"], score, document["text"], document["url"], document["license"])
        table.add_row(*(rich.text.Text(cell or "-") for cell in cells))
    console.print(table)


def _open_documents(folder: str | None) -> list[Document]:
    if folder is None:
        return []
    from rag_mm.data import sources

    documents = sources.FolderDocuments(folder)
    return [documents[i] for i in range(len(documents))]
