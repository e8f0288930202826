"""`rag-mm eval`: a published protocol on a run and pictures of your own."""

import argparse
import pathlib
from typing import Any

import rich.console

from rag_mm.core.errors import UserError

SUITES = ("zeroshot",)
REFINE = ("none", "image", "text", "both")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the suite, the run, the pictures and the memory."""
    parser.add_argument("--suite", required=True, choices=SUITES, help="what is measured")
    parser.add_argument("--workdir", required=True, metavar="RUN", help="a run of configs/reco.py")
    pictures = parser.add_mutually_exclusive_group(required=True)
    pictures.add_argument("--images", metavar="DIR", help="pictures as DIR/CLASS/picture.jpg")
    pictures.add_argument(
        "--dataset",
        metavar="NAME[:SPLIT]",
        help="a labelled TFDS dataset in ArrayRecord form, such as caltech_birds2011 (split: test)",
    )
    parser.add_argument(
        "--refine", choices=REFINE, default="both", help="which side looks things up (both)"
    )
    parser.add_argument("--memory", metavar="MEM", help="instead of the run's own")
    parser.add_argument("-k", type=int, dest="k", help="neighbors, if not as in training")
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="of a prompt, with {} for the class; given several times, their mean counts",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """`accuracy`, `ci95`, `n`, `frozen`, `gain`, and beside them what `stages.zeroshot` says."""
    from rag_mm.data import labelled

    if args.k is not None and args.k < 1:
        raise UserError(f"-k is {args.k}; give at least 1.")
    pictures: labelled.Labelled
    if args.images is not None:
        pictures = labelled.LabelledFolder(pathlib.Path(args.images))
    else:
        pictures = labelled.open_dataset(args.dataset)

    # The pictures are there before jax starts.
    from rag_mm.stages.reco import zeroshot_suite

    return zeroshot_suite.evaluate(
        args.workdir,
        pictures,
        refine=args.refine,
        memory=args.memory,
        num_neighbors=args.k,
        templates=args.template,
    )


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Says the accuracy, what the memory adds, and where the page is."""
    lines = [
        f"accuracy {result['accuracy']:.1%} ± {result['ci95']:.1%} of {result['n']} pictures, "
        f"{result['classes']} classes, refine={result['refine']}",
        f"frozen   {result['frozen']:.1%}, gain {100 * result['gain']:+.1f} points",
        f"page     {result['page']}",
    ]
    for name, reason in result["rejected"][:5]:
        lines.append(f"left out {name}: {reason}")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
