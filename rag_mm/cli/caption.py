"""`rag-mm caption`: a picture in words, and the documents that were read for it."""

import argparse
from typing import Any

import rich.console

from rag_mm.cli import session_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--image", required=True, help="a JPEG, PNG or WebP file")
    session_args.add_arguments(parser, temperature=0.0, top_p=1.0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Describes; `captions` likeliest first with their `log_probs`, `neighbors` the documents read."""
    from rag_mm.data import sources

    image = sources.load_image(args.image)
    options = session_args.options(args)
    written = session_args.load_session(args.workdir).caption(image, **options)
    return {
        "captions": written.captions,
        "log_probs": written.log_probs,
        "neighbors": written.neighbors,
    }


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the documents and the captions."""
    session_args.show_neighbors(result, console)
    for caption in result["captions"]:
        console.print(caption, markup=False, soft_wrap=True)
