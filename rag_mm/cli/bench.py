"""`rag-mm bench`: figures as ratios against a peer in the same process."""

import argparse
from typing import Any

import rich.console
import rich.table

from rag_mm.core import progress
from rag_mm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what can be measured, and its sizes."""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    memory = kinds.add_parser("memory", help="the memory's indexes beside FAISS (extra [bench])")
    memory.add_argument("--rows", type=int, default=300_000, help="of the memory (300000)")
    memory.add_argument("--dim", type=int, default=512, help="width of a row (512)")
    memory.add_argument("--recall", type=float, default=0.95, help="at 10, of both sides (0.95)")
    memory.add_argument("--threads", type=int, default=2, help="of both sides (2)")
    memory.add_argument("--rounds", type=int, default=5, help="of which the median counts (5)")
    memory.add_argument(
        "--small", type=int, default=0, help="rows whose build is timed beside the whole (none)"
    )
    memory.add_argument("--hnsw", action="store_true", help="FAISS's graph too, slow to build")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The cases by name, each with `ours`, `peer`, `ratio`, `machine`, `versions`."""
    counts = {"rows": 1_000, "dim": 8, "threads": 1, "rounds": 1, "small": 0}
    for name, least in counts.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}; give at least {least}.")
    if args.dim % 2 or not 0 < args.recall < 1:
        raise UserError("--dim is even, and --recall lies between 0 and 1.")
    from rag_mm.perf import bench_memory, faiss_peer

    faiss_peer.load()  # Its absence is found before minutes of work.
    config = bench_memory.Config(
        rows=args.rows,
        dim=args.dim,
        recall=args.recall,
        num_threads=args.threads,
        num_rounds=args.rounds,
        with_hnsw=args.hnsw,
        num_small=args.small,
    )
    return dict(bench_memory.run(config, progress.say))


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """One line a case."""
    table = rich.table.Table(box=None)
    for name in ("case", "ours", "peer", "ratio", "unit", "recall"):
        table.add_column(name)
    for name, case in result.items():
        recalls = [case[key] for key in ("our_recall", "peer_recall") if key in case]
        cells = [name, f"{case['ours']:.4g}", f"{case['peer']:.4g}", f"{case['ratio']:.2f}"]
        table.add_row(*cells, case["unit"], " / ".join(f"{recall:.3f}" for recall in recalls))
    console.print(table)
