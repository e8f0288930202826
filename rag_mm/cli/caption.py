"""`rag-mm caption`: captions for an image, using retrieved documents."""

import argparse
from typing import Any

import rich.console

from rag_mm.cli import session_args
from rag_mm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm caption`."""
    parser.add_argument(
        "--image",
        required=True,
        nargs="+",
        metavar="FILE",
        help="JPEG, PNG or WebP file; a run of Emu takes several together, such as the frames of a clip",
    )
    number = "number of captions, printed in the order of their mean log-probability per token"
    session_args.add_arguments(parser, temperature=0.0, top_p=1.0, number=number)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Captions an image, or several together.

    Returns:
        `captions`, those of the highest mean log-probability per token first, these `mean_log_probs` in nats,
        and `neighbors`.

    Raises:
        UserError: several images are given for a run of another model than Emu, or a stage for one of Emu.
    """
    from rag_mm.api import emu_session
    from rag_mm.data import sources

    images = [sources.load_image(name) for name in args.image]
    options = session_args.options(args)
    if emu_session.is_emu(args.workdir):
        if args.stage != "decoder":
            raise UserError(
                f"--stage={args.stage} is for runs that trained a decoder, but {args.workdir} is one of Emu; "
                "leave it out."
            )
        generated = emu_session.load(args.workdir, args.mesh).caption(images, **options)
    elif len(images) > 1:
        raise UserError(f"{args.workdir} captions one image at a time; give one --image.")
    else:
        generated = session_args.load_session(args, args.workdir).caption(images[0], **options)
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
