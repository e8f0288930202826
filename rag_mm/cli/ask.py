"""`rag-mm ask`: answers a question about an image, using retrieved documents."""

import argparse
from typing import Any

import rich.console

from rag_mm.cli import drawing_args, session_args
from rag_mm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm ask`."""
    parser.add_argument(
        "--image",
        required=True,
        nargs="+",
        metavar="FILE",
        help="JPEG, PNG or WebP file; a run of Emu takes several together, such as the frames of a clip",
    )
    parser.add_argument(
        "--question", required=True, help="question about it, such as: what is at the top left?"
    )
    number = "number of answers, printed in the order of their mean log-probability per token"
    session_args.add_arguments(
        parser, temperature=0.0, top_p=1.0, number=number, docs=1, stage=drawing_args.TUNED_STAGE
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Answers.

    Returns:
        `answers`, those of the highest mean log-probability per token first, these `mean_log_probs` in nats,
        and `neighbors`, the documents read.

    Raises:
        UserError: as of `Session.ask` or `EmuSession.ask`, or several images are given for a run of another
            model than Emu, or another stage than emu_sft for one of Emu.
    """
    from rag_mm.api import emu_session
    from rag_mm.data import sources

    images = [sources.load_image(name) for name in args.image]
    options = session_args.options(args)
    if emu_session.is_emu(args.workdir):
        if args.stage not in (drawing_args.TUNED_STAGE, emu_session.TUNED_STAGE):
            raise UserError(
                f"--stage={args.stage} is for runs that trained a decoder, but {args.workdir} is one of Emu, "
                f"whose tuned model is of the stage {emu_session.TUNED_STAGE}; leave it out."
            )
        found = emu_session.load(args.workdir, args.mesh).ask(images, args.question, **options)
    elif len(images) > 1:
        raise UserError(f"{args.workdir} answers about one image at a time; give one --image.")
    else:
        decoder = session_args.load_session(args, args.workdir)
        found = decoder.ask(images[0], args.question, **options)
    return {
        "answers": found.answers,
        "mean_log_probs": found.mean_log_probs,
        "neighbors": found.neighbors,
    }


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the documents and the answers."""
    session_args.show_neighbors(result, console)
    for answer in result["answers"]:
        console.print(answer, markup=False, soft_wrap=True)
