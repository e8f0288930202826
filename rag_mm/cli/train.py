"""`rag-mm train`: a config's stages in order, or one of them; what is finished is passed over."""

import argparse
from typing import Any

import rich.console

from rag_mm.core import config as config_lib
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
        "--overwrite", action="store_true", help="rebuild stages whose config or inputs changed"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the stages; `workdir` and everything measured so far, `metrics`."""
    if not args.workdir:
        raise UserError("--workdir is empty; name the run's folder.")
    config = config_lib.to_dict(config_lib.load_config(args.config, args.overrides))

    # The config is right before jax starts.
    from rag_mm.stages import chain

    finished = chain.run_chain(config, args.workdir, only=args.stage, overwrite=args.overwrite)
    return {"workdir": args.workdir, "metrics": finished.metrics}


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Says where the figures are."""
    console.print(f"Metrics: {result['workdir']}/metrics.json", markup=False, soft_wrap=True)
