"""`rag-mm eval`: a published evaluation protocol on a run and your own images."""

import argparse
import pathlib
from typing import Any

import rich.console

from rag_mm.core.errors import UserError

SUITES = ("zeroshot",)
REFINE = ("none", "image", "text", "both")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm eval`."""
    parser.add_argument("--suite", required=True, choices=SUITES, help="evaluation protocol")
    parser.add_argument(
        "--workdir", required=True, metavar="RUN", help="finished run of configs/reco.py"
    )
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--images", metavar="DIR", help="labeled images as DIR/CLASS/IMAGE.jpg")
    images.add_argument(
        "--dataset",
        metavar="NAME[:SPLIT]",
        help="labeled TFDS dataset in ArrayRecord form, such as caltech_birds2011 (default split: test)",
    )
    parser.add_argument(
        "--refine",
        choices=REFINE,
        default="both",
        help="which embeddings retrieval refines (default: both)",
    )
    parser.add_argument("--memory", metavar="MEM", help="memory to use instead of the run's own")
    parser.add_argument(
        "-k", type=int, dest="k", help="number of neighbors (default: as in training)"
    )
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="prompt template with {} for the class; repeat it to average several templates",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates. Returns `accuracy`, `ci95`, `n`, `frozen`, `gain` and more; see `zeroshot_suite`."""
    from rag_mm.data import labeled

    if args.k is not None and args.k < 1:
        raise UserError(f"-k is {args.k}; give at least 1.")
    images: labeled.Labeled
    if args.images is not None:
        images = labeled.LabeledFolder(pathlib.Path(args.images))
    else:
        images = labeled.open_dataset(args.dataset)

    # Imported only now, so that missing images are reported before jax starts.
    from rag_mm.stages.reco import zeroshot_suite

    return zeroshot_suite.evaluate(
        args.workdir,
        images,
        refine=args.refine,
        memory=args.memory,
        num_neighbors=args.k,
        templates=args.template,
    )


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the accuracy, the gain from the memory, and the page's path."""
    lines = [
        f"accuracy {result['accuracy']:.1%} ± {result['ci95']:.1%} of {result['n']} images, "
        f"{result['classes']} classes, refine={result['refine']}",
        f"frozen   {result['frozen']:.1%}, gain {100 * result['gain']:+.1f} points",
        f"page     {result['page']}",
    ]
    for name, reason in result["rejected"][:5]:
        lines.append(f"skipped {name}: {reason}")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
