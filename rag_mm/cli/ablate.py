"""`rag-mm ablate`: a config's variants at several seeds, as one table of paired differences."""

import argparse
from typing import Any

import rich.console

from rag_mm.core import configuration
from rag_mm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="PAGE[:PRESET]",
        help="a config with the key `ablation`; single values by --config.key=value",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="folder of the table and of a run a cell; a killed or finished one is gone on with",
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those of the config")
    parser.add_argument(
        "--reuse",
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs whose finished stages are copied where a cell would make the same",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="rebuild stages whose config or inputs changed"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the cells; `table` as `eval.ablation.results`, and `ok` if no cell is missing."""
    if not args.workdir:
        raise UserError("--workdir is empty; name the table's folder.")
    config = configuration.to_dict(configuration.load_config(args.config, args.overrides))

    # The config is right before jax starts.
    from rag_mm.stages import run_ablation

    table = run_ablation.run_ablation(
        config,
        args.workdir,
        seeds=args.seeds,
        reuse_from=args.reuse,
        overwrite=args.overwrite,
    )
    return {"workdir": args.workdir, "ok": not table["missing"], "table": table}


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the table and where it is."""
    from rag_mm.eval import ablation_table

    console.print(ablation_table.markdown(result["table"]), markup=False, soft_wrap=True)
    console.print(f"Table: {result['workdir']}/table.md", markup=False, soft_wrap=True)
