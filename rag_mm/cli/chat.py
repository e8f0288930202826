"""`rag-mm chat`: a dialogue about images with an Emu that was tuned on instructions."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import rich.console

from rag_mm.cli import session_args
from rag_mm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm chat`."""
    parser.add_argument("--workdir", required=True, metavar="RUN", help="finished run of Emu")
    parser.add_argument(
        "--image",
        nargs="+",
        default=[],
        metavar="FILE",
        help="JPEG, PNG or WebP files to talk about, such as the frames of a clip",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the dialogue begins with")
    parser.add_argument(
        "--docs",
        type=int,
        default=0,
        metavar="K",
        help="documents retrieved by the first image, to be read first (default: 0)",
    )
    session_args.add_mesh(parser)
    parser.add_argument("--seed", type=int, default=0, help="sampling seed (default: 0)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest answer (default: 0)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Answers each line of stdin, knowing the ones before, until the input ends.

    Returns:
        `messages`, each with `role` and `content`; the images are named in the first.

    Raises:
        UserError: the run is none of Emu or was not tuned, or as of `EmuSession.chat`.
    """
    from rag_mm.api import emu_session
    from rag_mm.data import sources

    images = [sources.load_image(name) for name in args.image]
    if not emu_session.is_emu(args.workdir):
        raise UserError(
            f"{args.workdir} is no run of Emu; chat needs one that was tuned by configs/emu.py:sft."
        )
    session = emu_session.load(args.workdir, args.mesh)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    said: list[dict[str, Any]] = []
    for line in _lines():
        content: Any = [*images, line] if not said else line
        said.append({"role": "user", "content": content})
        answer = session.chat(
            [*system, *said], docs=args.docs, seed=args.seed, temperature=args.temperature
        )
        said.append({"role": "assistant", "content": answer})
        if not args.json:
            print(answer, flush=True)
    if said:
        said[0]["content"] = [*args.image, said[0]["content"][-1]]
    return {"messages": [*system, *said]}


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints nothing more: each answer was printed when it was given."""
    del result, console


def _lines() -> Iterator[str]:
    """The lines of stdin that are not empty; on a terminal each is asked for."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
