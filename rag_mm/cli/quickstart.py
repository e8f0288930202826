"""`rag-mm quickstart`: the whole chain on emoji scenes, ending in a report and a ten-line table."""

import argparse
from typing import Any

import rich.console
import rich.table
import rich.text

from rag_mm.cli import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument(
        "--workdir",
        default="runs/quickstart",
        metavar="RUN",
        help="the run's folder; a killed or finished one is gone on with (default: %(default)s)",
    )
    parser.add_argument(
        "--config",
        default="configs/quickstart.py:quick",
        metavar="PAGE[:PRESET]",
        help="the config; single values by --config.key=value (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="rebuild stages whose config or inputs changed"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the chain; `report`, `metrics` and the headline `table`."""
    alone = dict(coordinator=None, num_processes=None, process_id=None)
    result = train.run(argparse.Namespace(**vars(args), stage=None, profile=None, **alone))

    from rag_mm import report

    table = [list(row) for row in report.summary_table(result["metrics"])]
    return {**result, "report": f"{args.workdir}/report.html", "table": table}


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the ten headline rows and where the report is."""
    table = rich.table.Table(box=None, show_header=False, pad_edge=False)
    for label, value, _ in result["table"]:
        table.add_row(rich.text.Text(label), rich.text.Text(value))
    console.print(table)
    console.print(f"Report: {result['report']}", markup=False, soft_wrap=True)
