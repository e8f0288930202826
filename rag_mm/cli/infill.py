"""`rag-mm infill`: a band of a picture drawn anew from its caption and what is around it."""

import argparse
import re
from typing import Any

from rag_mm.cli import asking, generate
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
    asking.add_arguments(parser, temperature=0.7, top_p=0.95)
    asking.add_out(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fills in; `images` are paths, `neighbors` the documents read."""
    from rag_mm.data import sources

    asking.check_out(args.out)
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", args.rows)
    if match is None:
        raise UserError(f"--rows={args.rows} is no band; write START:END, such as 8:24.")
    band = int(match[1]), int(match[2])
    image = sources.load_image(args.image)
    options = asking.options(args)
    drawn = asking.load_session(args.workdir).infill(image, args.prompt, band, **options)
    return {"images": asking.save_pictures(args.out, drawn.images), "neighbors": drawn.neighbors}


show = generate.show
