"""`rag-mm caption`: captions for an image, using retrieved documents."""

import argparse
from typing import Any

import rich.console

from rag_mm.cli import session_args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm caption`."""
    parser.add_argument("--image", required=True, help="JPEG, PNG or WebP file")
    number = "number of captions, printed in the order of their mean log-probability per token"
    session_args.add_arguments(parser, temperature=0.0, top_p=1.0, number=number)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Captions an image.

    Returns:
        `captions`, those of the highest mean log-probability per token first, these `mean_log_probs` in nats,
        and `neighbors`.
    """
    from rag_mm.data import sources

    image = sources.load_image(args.image)
    options = session_args.options(args)
    generated = session_args.load_session(args.workdir, args.mesh).caption(image, **options)
    return {
        "captions": generated.captions,
        "mean_log_probs": generated.mean_log_probs,
        "neighbors": generated.neighbors,
    }


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the documents and the captions."""
    session_args.show_neighbors(result, console)
    for caption in result["captions"]:
        console.print(caption, markup=False, soft_wrap=True)
