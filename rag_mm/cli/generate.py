"""`rag-mm generate`: images from a caption and retrieved documents."""

import argparse
from typing import TYPE_CHECKING, Any

import rich.console

from rag_mm.cli import drawing_args, session_args
from rag_mm.core.errors import UserError

if TYPE_CHECKING:
    from rag_mm.api.loaded_run import GeneratedImages

_SAMPLING = {"temperature": 0.7, "top_p": 0.95}
# Options that a run of Emu has no use for: it draws by diffusion.
_NOT_OF_EMU = {
    **_SAMPLING,
    "stage": "decoder",
    "boxes": None,
    "structure": None,
    "feature": drawing_args.SILHOUETTE,
    "best_of": 1,
    "image_size": None,
    "decoding": "sequential",
    **dict.fromkeys(("null", "documents_guidance", "plausible", "contrast", "contrast_alpha")),
    **dict.fromkeys(("amateur_temperature", "contrast_floor")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm generate`."""
    parser.add_argument("--prompt", required=True, help="caption of the image")
    parser.add_argument(
        "--image",
        nargs="+",
        default=[],
        metavar="FILE",
        help="put these images before the caption, which may then be empty: images in context and blends, by "
        "a run of Emu",
    )
    session_args.add_arguments(parser, _SAMPLING["temperature"], _SAMPLING["top_p"])
    drawing_args.add_boxes_and_structure(parser)
    parser.add_argument(
        "--best-of",
        type=int,
        default=1,
        metavar="N",
        help="generate N candidates per image and keep the one the retriever scores best (default: 1)",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="height and width, of a model trained on several (default: its first)",
    )
    session_args.add_steering(parser)
    parser.add_argument(
        "--decoding",
        default="sequential",
        metavar="WAY",
        help="sequential, code by code, or jacobi, many codes a pass: the same distribution; slower on "
        "a CPU, not timed on an accelerator (default: sequential)",
    )
    session_args.add_out(parser)
    drawing_args.add_sheet(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generates.

    Returns:
        `images`, the paths written, `neighbors`, the documents read, with --best-of `scores`, those of
        every image's candidates, and with --sheet `sheet`, its path.
    """
    session_args.check_out(args.out)
    drawing_args.check_sheet(args)
    given = drawing_args.read_boxes_and_structure(args)
    options = session_args.options(args)
    most = session_args.MAX_OUTPUTS // args.num
    if not 1 <= args.best_of <= most:
        raise UserError(f"--best-of is {args.best_of}; give 1 to {most:,}.")
    generated = _generate(args, given | options)
    structure = [(args.feature, given["structure"])] if "structure" in given else []
    result = {
        "images": session_args.save_images(args.out, generated.images),
        "neighbors": generated.neighbors,
        **drawing_args.save_sheet(args, structure, generated, given.get("boxes", ())),
    }
    if generated.scores is None:
        return result
    return result | {"scores": generated.scores.tolist()}


def _generate(args: argparse.Namespace, options: dict[str, Any]) -> "GeneratedImages":
    from rag_mm.api import emu_session
    from rag_mm.data import sources

    if emu_session.is_emu(args.workdir):
        given = [name for name, value in _NOT_OF_EMU.items() if getattr(args, name) != value]
        if given:
            option = "--" + given[0].replace("_", "-")
            raise UserError(
                f"{option} is for decoders of image codes, but {args.workdir} is a run of Emu; leave it out."
            )
        own = {name: value for name, value in options.items() if name not in _SAMPLING}
        images = [sources.load_image(name) for name in args.image]
        prompt = [*images, *([args.prompt] if args.prompt.strip() else [])]
        session = emu_session.load(args.workdir, args.mesh)
        return session.generate(prompt, guidance=args.guidance, **own)
    if args.image:
        raise UserError(f"--image is for runs of Emu, but {args.workdir} is none; leave it out.")
    steering = session_args.steering(args)
    return session_args.load_session(args, args.workdir).generate(
        args.prompt,
        best_of=args.best_of,
        image_size=args.image_size,
        decoding=args.decoding,
        **steering,
        **options,
    )


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the documents and the paths, each with the scores of its candidates if there are several."""
    session_args.show_neighbors(result, console)
    show_paths(result, console)


def show_paths(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the paths written."""
    for number, path in enumerate(result["images"]):
        scores = ""
        if "scores" in result:
            values = result["scores"][number]
            scores = f"  best of {', '.join(f'{value:.3f}' for value in values)}"
        console.print(path + scores, markup=False, soft_wrap=True)
    if "sheet" in result:
        console.print(result["sheet"], markup=False, soft_wrap=True)
