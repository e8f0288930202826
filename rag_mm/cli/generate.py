"""`rag-mm generate`: pictures from a caption, and the documents that were read for them."""

import argparse
from typing import Any

import rich.console

from rag_mm.cli import session_args
from rag_mm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--prompt", required=True, help="the caption to draw")
    session_args.add_arguments(parser, temperature=0.7, top_p=0.95)
    parser.add_argument(
        "--best-of",
        type=int,
        default=1,
        help="candidates a picture, the retriever keeps the best (default: 1)",
    )
    session_args.add_out(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Draws; `images` are paths, `neighbors` the documents read."""
    session_args.check_out(args.out)
    options = session_args.options(args)
    if args.best_of < 1:
        raise UserError(f"--best-of={args.best_of} leaves no candidate; give at least 1.")
    drawn = session_args.load_session(args.workdir).generate(
        args.prompt, best_of=args.best_of, **options
    )
    return {
        "images": session_args.save_pictures(args.out, drawn.images),
        "neighbors": drawn.neighbors,
    }


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the paths and the documents."""
    session_args.show_neighbors(result, console)
    for path in result["images"]:
        console.print(path, markup=False, soft_wrap=True)
