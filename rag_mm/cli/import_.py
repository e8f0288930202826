"""`rag-mm import`: a public checkpoint becomes a run."""

import argparse
import pathlib
import time
from typing import Any

import rich.console

from rag_mm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("family", metavar="FAMILY", help="clip, llama or chameleon")
    parser.add_argument(
        "folder",
        metavar="DIR",
        help="config.json, safetensors and, if at hand, the tokenizer's files",
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="the new run's folder")
    parser.add_argument(
        "--dtype", help="float32, float16 or bfloat16 (default: as stored, bit for bit)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Imports; family, run, tensors, bytes, dtypes, has_tokenizer and seconds."""
    from rag_mm.api import importing

    if "://" in args.out:
        raise UserError(f"--out={args.out} is not a local folder; import there, then copy it.")
    began = time.monotonic()
    dtype = importing.find_dtype(args.dtype)
    made = importing.import_checkpoint(
        args.family, pathlib.Path(args.folder), pathlib.Path(args.out), dtype
    )
    return made | {"seconds": round(time.monotonic() - began, 3)}


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Says what was made and how to use it."""
    size, dtypes = result["bytes"] / 1e6, ", ".join(result["dtypes"])
    console.print(
        f"{result['run']}: {result['family']}, {result['tensors']} tensors, {size:,.1f} MB of {dtypes}, "
        f"{result['seconds']:.1f} s",
        markup=False,
    )
    if not result["has_tokenizer"]:
        console.print("There was no tokenizer: it takes ids and pictures, no text.")
    if result["family"] == "clip":
        console.print(
            f"rag-mm memory build --documents=DIR --retriever={result['run']} --out=MEM",
            markup=False,
        )
    console.print(f'rag_mm.load("{result["run"]}")', markup=False)
