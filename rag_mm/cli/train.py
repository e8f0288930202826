"""`rag-mm train`: a config's stages in order, or one of them; what is finished is passed over."""

import argparse
from typing import Any

import rich.console

from rag_mm.cli import process_args
from rag_mm.core import configuration
from rag_mm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="PAGE[:PRESET]",
        help="such as configs/quickstart.py:quick; single values by --config.key=value",
    )
    parser.add_argument("--workdir", required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--stage", help="run this stage alone")
    parser.add_argument(
        "--profile",
        metavar="A:B",
        help="trace steps A to B of each stage that trains, for TensorBoard, into its folder profile/",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="rebuild stages whose config or inputs changed"
    )
    process_args.add_arguments(
        parser, "that train together; start all of them alike, with one folder as --workdir"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the stages; `workdir` and everything measured so far, `metrics`."""
    if not args.workdir:
        raise UserError("--workdir is empty; name the run's folder.")
    process_args.check_arguments(args)
    config = configuration.to_dict(configuration.load_config(args.config, args.overrides))
    steps = _read_steps(args.profile)

    # The config is right before jax starts.
    from rag_mm.stages import chain
    from rag_mm.train import loop

    chain.stage_configs(config)  # And all of it before others are met, which would wait in vain.
    with process_args.joined(args), loop.profiled(steps):
        finished = chain.run_chain(config, args.workdir, only=args.stage, overwrite=args.overwrite)
    return {"workdir": args.workdir, "metrics": finished.metrics}


def _read_steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise UserError(f"--profile={text} does not read as first:last step; write 10:12.")
    return int(first), int(last)


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Says where the figures are."""
    console.print(f"Metrics: {result['workdir']}/metrics.json", markup=False, soft_wrap=True)
