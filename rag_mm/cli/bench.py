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
    memory.add_argument(
        "--small", type=int, default=0, help="rows whose build is timed beside the whole (none)"
    )
    memory.add_argument("--hnsw", action="store_true", help="FAISS's graph too, slow to build")
    train = kinds.add_parser("train", help="the training step beside PyTorch (extra [parity])")
    train.add_argument("--batch", type=int, default=48, help="rows of a step (48)")
    train.add_argument(
        "--no-compiled", action="store_true", help="leave out torch.compile, which wants a compiler"
    )
    decode = kinds.add_parser("decode", help="greedy decoding beside generate (extra [parity])")
    decode.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="rows (1 4 16)")
    decode.add_argument("--new", type=int, default=64, help="tokens to decode (64)")
    for model in (train, decode):
        model.add_argument("--against", choices=["transformers"], default="transformers")
        model.add_argument("--length", type=int, default=152, help="tokens of a row (152)")
        model.add_argument("--layers", type=int, default=4, help="of the decoder (4)")
    train.add_argument(
        "--widths", type=int, nargs="+", default=[192, 768], help="of the decoder (192 768)"
    )
    decode.add_argument("--widths", type=int, nargs=1, default=[192], help="of the decoder (192)")
    for each in (memory, train, decode):
        each.add_argument("--threads", type=int, default=2, help="of both sides (2)")
        each.add_argument("--rounds", type=int, default=5, help="of which the median counts (5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The cases by name, each with `ours`, `peer`, `ratio`, `machine`, `versions`."""
    _check_least(args, threads=1, rounds=1)
    return _run_memory(args) if args.what == "memory" else _run_model(args)


def _run_memory(args: argparse.Namespace) -> dict[str, Any]:
    _check_least(args, rows=1_000, dim=8, small=0)
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


def _run_model(args: argparse.Namespace) -> dict[str, Any]:
    _check_least(args, layers=1, length=2)
    if any(width < 32 or width % 32 for width in args.widths):
        raise UserError(f"--widths are multiples of 32, not {args.widths}.")
    from rag_mm.perf import bench_models, torch_peer

    torch_peer.load()  # Its absence is found before minutes of work.
    shape = dict(
        widths=tuple(args.widths),
        num_layers=args.layers,
        length=args.length,
        num_threads=args.threads,
        num_rounds=args.rounds,
    )
    if args.what == "train":
        _check_least(args, batch=1)
        config = bench_models.Config(
            **shape, batch_size=args.batch, with_compiled=not args.no_compiled
        )
        return dict(bench_models.train(config, progress.say))
    _check_least(args, new=1)
    if min(args.batches) < 1 or args.new >= args.length:
        raise UserError("--batches are at least 1, and --new leaves room for a prompt in --length.")
    config = bench_models.Config(**shape, batch_sizes=tuple(args.batches), num_new=args.new)
    return dict(bench_models.decode(config, progress.say))


def _check_least(args: argparse.Namespace, **least: int) -> None:
    for name, value in least.items():
        if getattr(args, name) < value:
            raise UserError(f"--{name} is {getattr(args, name)}; give at least {value}.")


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
