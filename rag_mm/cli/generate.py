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
    session_args.add_steering(parser)
    parser.add_argument(
        "--decoding",
        default="sequential",
        metavar="WAY",
        help="sequential, code by code, or jacobi, many codes a pass: the same distribution; slower on "
        "a CPU, not timed on an accelerator (default: sequential)",
    )
    session_args.add_out(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generates.

    Returns:
        `images`, the paths written, `neighbors`, the documents read, and with --best-of `scores`, those of
        every image's candidates.
    """
    session_args.check_out(args.out)
    options = session_args.options(args)
    most = session_args.MAX_OUTPUTS // args.num
    if not 1 <= args.best_of <= most:
        raise UserError(f"--best-of is {args.best_of}; give 1 to {most:,}.")
    steering = session_args.steering(args)
    generated = session_args.load_session(args, args.workdir).generate(
        args.prompt,
        best_of=args.best_of,
        image_size=args.image_size,
        decoding=args.decoding,
        **steering,
        **options,
    )
    result = {
        "images": session_args.save_images(args.out, generated.images),
        "neighbors": generated.neighbors,
    }
    if generated.scores is None:
        return result
    return result | {"scores": generated.scores.tolist()}


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the documents and the paths, each with the scores of its candidates if there are several."""
    session_args.show_neighbors(result, console)
    for number, path in enumerate(result["images"]):
        scores = ""
        if "scores" in result:
            values = result["scores"][number]
            scores = f"  best of {', '.join(f'{value:.3f}' for value in values)}"
        console.print(path + scores, markup=False, soft_wrap=True)
