"""`rag-mm export`: writes a run's model as a public checkpoint."""

import argparse
import pathlib
import re
import time
from typing import Any

import rich.console

from rag_mm.cli import session_args
from rag_mm.core.errors import UserError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm export`."""
    parser.add_argument(
        "family",
        metavar="FAMILY",
        help="clip, siglip2, llama, chameleon or emu; cm3 for a decoder trained with rag-mm",
    )
    parser.add_argument("workdir", metavar="RUN", help="imported or finished run")
    parser.add_argument("out", metavar="OUT", help="new folder to write")
    parser.add_argument(
        "--dtype",
        help="float32, float16 or bfloat16 (default: the stored dtype, bitwise identical)",
    )
    parser.add_argument(
        "--shard-size",
        default="5GB",
        help="maximum size of one weight file, such as 500MB (default: 5GB)",
    )
    session_args.add_stage(parser)
    parser.add_argument(
        "--card",
        action="store_true",
        help="also write a model card, README.md: what the model is, its training, metrics and licenses",
    )
    parser.add_argument(
        "--license",
        metavar="ID",
        help="license of the weights for the card, as the Hugging Face Hub names it, such as apache-2.0",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Exports. Returns family, out, files, tensors, bytes, dtypes and seconds."""
    from rag_mm.api import exporting, importing, model_card

    if args.license is not None and not (args.card and args.license.strip()):
        raise UserError("--license=ID names a license in the model card; give it with --card.")
    card_license = (args.license or model_card.UNKNOWN) if args.card else None
    start = time.monotonic()
    dtype, max_bytes = importing.find_dtype(args.dtype), parse_size(args.shard_size)
    exported = exporting.export_checkpoint(
        args.family,
        pathlib.Path(args.workdir),
        pathlib.Path(args.out),
        max_bytes,
        dtype,
        card_license,
        args.stage,
    )
    return exported | {"seconds": round(time.monotonic() - start, 3)}


def parse_size(text: str) -> int:
    """Number of bytes in a text such as 5GB, 1.5GB or 800MB.

    Raises:
        UserError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(KB|MB|GB)", text.strip().upper())
    size = float(match[1]) * _UNITS[match[2]] if match else 0
    if size < 1:
        raise UserError(f"--shard-size={text} is not a size; write 500MB or 5GB.")
    return round(size)


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints what was written."""
    size, dtypes = result["bytes"] / 1e6, ", ".join(result["dtypes"])
    console.print(
        f"{result['out']}: {result['family']}, {result['tensors']} tensors in {len(result['files'])} "
        f"file(s), {size:,.1f} MB of {dtypes}, {result['seconds']:.1f} s",
        markup=False,
    )
