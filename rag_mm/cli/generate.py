"""`rag-mm generate`: images from a caption and retrieved documents."""

import argparse
from typing import Any

import rich.console

from rag_mm.cli import session_args
from rag_mm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm generate`."""
    parser.add_argument("--prompt", required=True, help="caption of the image")
    session_args.add_arguments(parser, temperature=0.7, top_p=0.95)
    parser.add_argument(
        "--best-of",
        type=int,
        default=1,
        metavar="N",
        help="generate N candidates per image and keep the one the retriever scores best (default: 1)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="height and width, of a model trained on several (default: its first)",
    )
    session_args.add_out(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generates. Returns `images`, the paths written, and `neighbors`, the documents read."""
    session_args.check_out(args.out)
    options = session_args.options(args)
    most = session_args.MAX_OUTPUTS // args.num
    if not 1 <= args.best_of <= most:
        raise UserError(f"--best-of is {args.best_of}; give 1 to {most:,}.")
    generated = session_args.load_session(args.workdir, args.mesh).generate(
        args.prompt, best_of=args.best_of, image_size=args.image_size, **options
    )
    return {
        "images": session_args.save_images(args.out, generated.images),
        "neighbors": generated.neighbors,
    }


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the documents and the paths."""
    session_args.show_neighbors(result, console)
    for path in result["images"]:
        console.print(path, markup=False, soft_wrap=True)
