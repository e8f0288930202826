"""`rag-mm infill`: regenerates a band of an image from the rest of the image and a caption."""

import argparse
import re
from typing import Any

from rag_mm.cli import generate, session_args
from rag_mm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm infill`."""
    parser.add_argument("--image", required=True, help="JPEG, PNG or WebP file")
    parser.add_argument("--prompt", required=True, help="caption of the whole image")
    parser.add_argument(
        "--rows",
        required=True,
        metavar="START:END",
        help="band to regenerate, in pixel rows at the model's image size, such as 8:24",
    )
    session_args.add_arguments(parser, temperature=0.7, top_p=0.95)
    session_args.add_out(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Infills. Returns `images`, the paths written, and `neighbors`, the documents read."""
    from rag_mm.data import sources

    session_args.check_out(args.out)
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", args.rows)
    if match is None:
        raise UserError(f"--rows={args.rows} is not START:END, such as 8:24.")
    band = int(match[1]), int(match[2])
    image = sources.load_image(args.image)
    options = session_args.options(args)
    generated = session_args.load_session(args, args.workdir).infill(
        image, args.prompt, band, **options
    )
    return {
        "images": session_args.save_images(args.out, generated.images),
        "neighbors": generated.neighbors,
    }


show = generate.show
