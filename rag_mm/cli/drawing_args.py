"""Options of generate and edit about what is drawn from, and the sheet that shows it beside what is drawn."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_mm.cli import session_args
from rag_mm.core import files

if TYPE_CHECKING:
    from rag_mm.api.loaded_run import GeneratedImages
    from rag_mm.data.named_boxes import NamedBox

SILHOUETTE = "silhouette"
TUNED_STAGE = "sft"
_SHEET_COLUMNS = 8
Labeled = tuple[str, np.ndarray]
"""A label and pixels uint8 [H, W, 3]."""


def add_boxes_and_structure(parser: argparse.ArgumentParser) -> None:
    """Adds --boxes, --structure and --feature, with which --stage and --docs have other defaults."""
    group = parser.add_argument_group(
        "boxes and structures (CM3Leon)",
        f"For a decoder tuned on instructions: --stage is {TUNED_STAGE} and --docs 1 unless given.",
    )
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--boxes",
        metavar="FILE",
        help='JSON list [{"name": "apple", "box": [left, top, right, bottom]}, ...] in pixels; --prompt says '
        "what they leave out, such as: on a red background",
    )
    either.add_argument(
        "--structure",
        metavar="IMAGE",
        help="silhouette, edges or another feature map, of the size of the image to draw",
    )
    group.add_argument(
        "--feature",
        default=SILHOUETTE,
        metavar="NAME",
        help=f"which map that is, one that the decoder was tuned on (default: {SILHOUETTE})",
    )
    parser.set_defaults(docs=None, stage=None)


def read_boxes_and_structure(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments `boxes`, `structure` and `feature` of `Session.generate`, those that are given.

    Sets `stage` and `docs` of `args` to their defaults where they are not given.

    Raises:
        UserError: a file cannot be read, or is of another form.
    """
    from rag_mm.data import named_boxes, sources

    is_instruction = args.boxes is not None or args.structure is not None
    if args.stage is None:
        args.stage = TUNED_STAGE if is_instruction else "decoder"
    if args.docs is None:
        args.docs = 1 if is_instruction else 2
    if args.boxes is not None:
        return {"boxes": named_boxes.read(args.boxes)}
    if args.structure is not None:
        return {"structure": sources.load_image(args.structure), "feature": args.feature}
    return {}


def add_sheet(parser: argparse.ArgumentParser) -> None:
    """Adds --sheet."""
    parser.add_argument(
        "--sheet",
        metavar="PNG",
        help="also write one image that shows what was given beside all that was drawn",
    )


def check_sheet(args: argparse.Namespace) -> None:
    """Raises UserError before any work is done if --sheet cannot be written."""
    if args.sheet is not None:
        session_args.check_out(args.sheet, "--sheet")


def save_sheet(
    args: argparse.Namespace,
    given: Sequence[Labeled],
    images: "GeneratedImages",
    boxes: Sequence["NamedBox"] = (),
) -> dict[str, str]:
    """Writes the file of --sheet: under --prompt what was given, and all that was drawn, boxes over it.

    Returns:
        `sheet`, the path written; nothing without --sheet.
    """
    if args.sheet is None:
        return {}
    from rag_mm.core import image_files
    from rag_mm.report import box_outlines, sheets

    corners = [(left, top, right, bottom) for _, (left, top, right, bottom) in boxes]
    drawn = [(label, box_outlines.outline(pixels, corners)) for label, pixels in _label(images)]
    shown = [*given, *drawn]
    rows = [shown[start : start + _SHEET_COLUMNS] for start in range(0, len(shown), _SHEET_COLUMNS)]
    sheet = sheets.contact_sheet([([] if i else [args.prompt], row) for i, row in enumerate(rows)])
    files.write_atomic(args.sheet, image_files.encode_png(np.asarray(sheet)))
    return {"sheet": args.sheet}


def _label(images: "GeneratedImages") -> list[Labeled]:
    """The images with their numbers; of several candidates each, with its score."""
    if images.candidates is None or images.scores is None:
        return [(str(number), pixels) for number, pixels in enumerate(images.images)]
    pairs = zip(images.candidates, images.scores.tolist(), strict=True)
    return [
        (f"{number}: {score:.3f}", pixels)
        for number, pair in enumerate(pairs)
        for pixels, score in zip(*pair, strict=True)
    ]
