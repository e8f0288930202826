"""`rag-mm quickstart`: every stage on emoji scenes, then a report and a ten-line summary table."""

import argparse
from typing import Any

import rich.console
import rich.table
import rich.text

from rag_mm.cli import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm quickstart`."""
    parser.add_argument(
        "--workdir",
        default="runs/quickstart",
        metavar="RUN",
        help="run folder; an interrupted run resumes (default: %(default)s)",
    )
    parser.add_argument(
        "--config",
        default="configs/quickstart.py:quick",
        metavar="PAGE[:PRESET]",
        help="config page; override a value with --config.key=value (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="rebuild stages whose config or inputs changed"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs every stage. Returns `workdir`, `metrics`, the `report` path and the summary `table`."""
    options = dict(stage=None, profile=None, show=False, tracker=None, reuse=())
    options |= dict(coordinator=None, num_processes=None, process_id=None)
    result = train.run(argparse.Namespace(**vars(args), **options))

    from rag_mm import report

    table = [list(row) for row in report.summary_table(result["metrics"])]
    return {**result, "report": f"{args.workdir}/report.html", "table": table}


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the ten summary lines and the report's path."""
    table = rich.table.Table(box=None, show_header=False, pad_edge=False)
    for label, value, _ in result["table"]:
        table.add_row(rich.text.Text(label), rich.text.Text(value))
    console.print(table)
    console.print(f"Report: {result['report']}", markup=False, soft_wrap=True)
