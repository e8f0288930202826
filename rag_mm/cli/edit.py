"""`rag-mm edit`: changes an image as a text says."""

import argparse
from typing import Any

from rag_mm.cli import drawing_args, generate, session_args
from rag_mm.core.errors import UserError

_LABELS = ("given", "second")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm edit`."""
    parser.add_argument(
        "--image",
        required=True,
        action="append",
        metavar="FILE",
        help="JPEG, PNG or WebP file; twice for a second image, from which something is taken",
    )
    parser.add_argument(
        "--prompt", required=True, help="what to change, such as: change the background to red"
    )
    session_args.add_sampling(
        parser,
        temperature=0.4,
        top_p=1.0,
        number="number of edited images",
        stage=drawing_args.TUNED_STAGE,
    )
    for option, what in (("guidance", "prompt"), ("image-guidance", "images")):
        parser.add_argument(
            f"--{option}",
            type=float,
            default=1.0,
            metavar="W",
            help=f"weight of the {what}: more guides, 0 leaves them out (default: 1, plain sampling)",
        )
    parser.add_argument(
        "--plausible",
        type=float,
        default=0.0,
        metavar="A",
        help="keep only tokens of at least A times the largest probability (default: 0)",
    )
    session_args.add_out(parser)
    drawing_args.add_sheet(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Edits.

    Returns:
        `images`, the paths written, `neighbors`, which is empty, and with --sheet `sheet`, its path.

    Raises:
        UserError: as of `Session.edit`, or there are more than two images.
    """
    from rag_mm.data import sources

    session_args.check_out(args.out)
    drawing_args.check_sheet(args)
    if len(args.image) > len(_LABELS):
        raise UserError(f"There are {len(args.image)} images; give one or two --image.")
    given = [sources.load_image(name) for name in args.image]
    options = session_args.sampling_options(args)
    edited = session_args.load_session(args, args.workdir).edit(
        given[0],
        args.prompt,
        second=given[1] if len(given) > 1 else None,
        guidance=args.guidance,
        image_guidance=args.image_guidance,
        plausible=args.plausible,
        **options,
    )
    shown = list(zip(_LABELS, given, strict=False))
    return {
        "images": session_args.save_images(args.out, edited.images),
        "neighbors": edited.neighbors,
        **drawing_args.save_sheet(args, shown, edited),
    }


show = generate.show_paths
