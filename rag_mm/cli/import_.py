"""`rag-mm import`: converts a public checkpoint, or the image tokenizer in one, into a run."""

import argparse
import pathlib
import time
from typing import Any

import rich.console


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm import`."""
    parser.add_argument(
        "family",
        metavar="FAMILY",
        help="clip, siglip2, llama, chameleon or emu; image-tokenizer, that of a Chameleon, Janus or Emu3; "
        "or gguf, a LLaMA in one file",
    )
    parser.add_argument(
        "folder",
        metavar="PATH",
        help="folder with config.json, safetensors and, optionally, the tokenizer's files; or the GGUF file",
    )
    parser.add_argument("--out", required=True, metavar="RUN", help="folder of the new run")
    parser.add_argument(
        "--dtype",
        help="float32, float16 or bfloat16 (default: the stored dtype, bitwise identical; of gguf float32)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Imports. Returns family, run, tensors, bytes, dtypes, has_tokenizer and seconds."""
    from rag_mm.api import importing

    start = time.monotonic()
    dtype = importing.find_dtype(args.dtype)
    source, out = pathlib.Path(args.folder), pathlib.Path(args.out)
    if args.family == importing.GGUF:
        imported = importing.import_gguf(source, out, dtype)
    else:
        imported = importing.import_checkpoint(args.family, source, out, dtype)
    return imported | {"seconds": round(time.monotonic() - start, 3)}


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints what was imported and how to use it."""
    size, dtypes = result["bytes"] / 1e6, ", ".join(result["dtypes"])
    console.print(
        f"{result['run']}: {result['family']}, {result['tensors']} tensors, {size:,.1f} MB of {dtypes}, "
        f"{result['seconds']:.1f} s",
        markup=False,
    )
    if result["family"] == "image-tokenizer":
        console.print(
            f"rag-mm memory build --documents=DIR --retriever=RUN --tokenizer={result['run']} --out=MEM",
            markup=False,
        )
    elif not result["has_tokenizer"]:
        console.print(
            "The checkpoint has no tokenizer: the model takes token ids and images, not text."
        )
    if result["family"] in ("clip", "siglip2"):
        console.print(
            f"rag-mm memory build --documents=DIR --retriever={result['run']} --out=MEM",
            markup=False,
        )
    console.print(f'rag_mm.load("{result["run"]}")', markup=False)
