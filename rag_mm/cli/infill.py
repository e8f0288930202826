"""`rag-mm infill`: a band of a picture drawn anew from its caption and what is around it."""

import argparse
import re
from typing import Any

from rag_mm.cli import generate, session_args
from rag_mm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("--image", required=True, help="a JPEG, PNG or WebP file")
    parser.add_argument("--prompt", required=True, help="the whole picture's caption")
    parser.add_argument(
        "--rows",
        required=True,
        metavar="START:END",
        help="the band to redraw, in rows of pixels of the model's picture, such as 8:24",
    )
    session_args.add_arguments(parser, temperature=0.7, top_p=0.95)
    session_args.add_out(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fills in; `images` are paths, `neighbors` the documents read."""
    from rag_mm.data import sources

    session_args.check_out(args.out)
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", args.rows)
    if match is None:
        raise UserError(f"--rows={args.rows} is no band; write START:END, such as 8:24.")
    band = int(match[1]), int(match[2])
    image = sources.load_image(args.image)
    options = session_args.options(args)
    drawn = session_args.load_session(args.workdir).infill(image, args.prompt, band, **options)
    return {
        "images": session_args.save_pictures(args.out, drawn.images),
        "neighbors": drawn.neighbors,
    }


show = generate.show
