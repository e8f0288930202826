"""`rag-mm ablate`: a config's variants at several seeds, compared in a table of paired differences."""

import argparse
from typing import Any

import rich.console

from rag_mm.core import configuration
from rag_mm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm ablate`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="PAGE[:PRESET]",
        help="config page with an `ablation` section; override a value with --config.key=value",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="folder for the table and one run per cell; an interrupted ablation resumes",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="replace the config's seeds")
    parser.add_argument(
        "--reuse",
        nargs="+",
        default=[],
        metavar="RUN",
        help="copy finished stages from these runs where config and inputs are the same",
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help="only make the table again, from the cells that are in the folder; run nothing",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="rebuild stages whose config or inputs changed"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the cells. Returns `table` (see `ablation_table.results`) and `ok`: no cell is missing."""
    if not args.workdir:
        raise UserError("--workdir is empty. Give the folder for the table.")
    configuration.load_config(args.config)  # A mistyped name is refused before jax is imported.

    from rag_mm.stages import chain_config, run_ablation

    config = chain_config.load(args.config, args.overrides)
    if args.table:
        table = run_ablation.make_table(config, args.workdir, seeds=args.seeds)
        return {"workdir": args.workdir, "ok": not table["missing"], "table": table}
    table = run_ablation.run_ablation(
        config,
        args.workdir,
        seeds=args.seeds,
        reuse_from=args.reuse,
        overwrite=args.overwrite,
    )
    return {"workdir": args.workdir, "ok": not table["missing"], "table": table}


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the table and its path."""
    from rag_mm.eval import ablation_table

    console.print(ablation_table.markdown(result["table"]), markup=False, soft_wrap=True)
    console.print(f"Table: {result['workdir']}/table.md", markup=False, soft_wrap=True)
