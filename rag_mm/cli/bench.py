"""`rag-mm bench`: figures as ratios against a peer in the same process, or against a published peak."""

import argparse
from typing import Any

import rich.console
import rich.table

from rag_mm.core import progress
from rag_mm.core.errors import UserError

# What each comparison reads, with its defaults; None leaves the choice to the size.
_SHAPE = dict(length=152, layers=4, threads=2)
_PEAK = dict(size="1.3b", rounds=5)
_TRAIN = dict(_SHAPE, widths=[192, 768], batch=48)
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "train": {
        "transformers": dict(_TRAIN, rounds=5, no_compiled=False),
        "unguarded": dict(_TRAIN, rounds=40, steps=1),
        "peak": dict(_PEAK, batch=None, remat=None, loss_chunks=8, steps=10),
    },
    "decode": {
        "transformers": dict(_SHAPE, widths=[192], batches=[1, 4, 16], new=64, rounds=5),
        "peak": dict(_PEAK, length=None, new=None),
    },
}


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
    memory.add_argument("--threads", type=int, default=2, help="of both sides (2)")
    memory.add_argument("--rounds", type=int, default=5, help="of which the median counts (5)")
    train = kinds.add_parser("train", help="the training step beside a peer, or against a peak")
    decode = kinds.add_parser("decode", help="greedy decoding beside a peer, or against a peak")
    for model in (train, decode):
        peers = list(SETTINGS[model.prog.split()[-1]])
        model.add_argument(
            "--against",
            choices=peers,
            default="transformers",
            help="PyTorch (extra [parity]), the default"
            + ("; unguarded, the step without train.guard" if model is train else "")
            + "; peak, what the device's maker publishes",
        )
        model.add_argument("--size", choices=["tiny", "1.3b", "7b"], help="peak: model (1.3b)")
        model.add_argument(
            "--length", type=int, help="tokens of a row (152; decoding beside peak: 1024)"
        )
        model.add_argument("--layers", type=int, help="of the decoder (4)")
        model.add_argument("--threads", type=int, help="of both sides (2)")
        model.add_argument(
            "--rounds", type=int, help="of which the median counts (5; unguarded: 40)"
        )
    train.add_argument("--widths", type=int, nargs="+", help="of the decoder (192 768)")
    train.add_argument("--batch", type=int, help="rows of a step (48; peak: 8 of 1.3b, 4 of 7b)")
    train.add_argument("--steps", type=int, help="timed at once (unguarded: 1; peak: 10)")
    train.add_argument(
        "--no-compiled",
        action="store_true",
        default=None,
        help="leave out torch.compile, which wants a compiler",
    )
    train.add_argument(
        "--remat", choices=["none", "dots", "full"], help="peak: dots of 1.3b, full of 7b"
    )
    train.add_argument("--loss-chunks", type=int, help="peak: runs of logits (8)")
    decode.add_argument("--widths", type=int, nargs=1, help="of the decoder (192)")
    decode.add_argument("--batches", type=int, nargs="+", help="rows (1 4 16)")
    decode.add_argument("--new", type=int, help="tokens to decode (64; peak: half of a row)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The cases by name, each with `ours`, `peer`, `ratio`, `machine`, `versions`."""
    if args.what == "memory":
        return _run_memory(args)
    _settle(args)
    _check_least(args, rounds=1, threads=1, layers=1, length=2, batch=1, steps=1, loss_chunks=1)
    _check_least(args, new=1)
    measure = {"peak": _run_peak, "unguarded": _run_unguarded, "transformers": _run_model}
    return measure[args.against](args)


def _settle(args: argparse.Namespace) -> None:
    """Fills in the defaults of this comparison; what it would not read is refused."""
    every = SETTINGS[args.what]
    for name in sorted({name for settings in every.values() for name in settings}):
        is_read = name in every[args.against]
        if getattr(args, name) is None:
            setattr(args, name, every[args.against][name] if is_read else None)
        elif not is_read:
            option = name.replace("_", "-")
            readers = ", ".join(peer for peer, settings in every.items() if name in settings)
            raise UserError(
                f"--{option} says nothing to --against={args.against}, but to {readers}."
            )


def _run_memory(args: argparse.Namespace) -> dict[str, Any]:
    _check_least(args, threads=1, rounds=1, rows=1_000, dim=8, small=0)
    if args.dim % 2 or not 0 < args.recall < 1:
        raise UserError("--dim is even, and --recall lies between 0 and 1.")
    from rag_mm.perf.bench import faiss_peer, indexes

    faiss_peer.load()  # Its absence is found before minutes of work.
    config = indexes.IndexBenchConfig(
        rows=args.rows,
        dim=args.dim,
        recall=args.recall,
        num_threads=args.threads,
        num_rounds=args.rounds,
        with_hnsw=args.hnsw,
        num_small=args.small,
    )
    return dict(indexes.run(config, progress.say))


def _run_peak(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.perf.bench import peak

    if args.what == "decode":
        return peak.decode(args.size, args.length, args.new, args.rounds, progress.say)
    return peak.train(
        args.size,
        args.batch,
        args.remat,
        loss_chunks=args.loss_chunks,
        num_steps=args.steps,
        num_rounds=args.rounds,
        say=progress.say,
    )


def _run_unguarded(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.perf.bench import guard_cost, steps, timing

    _check_least(args, rounds=timing.LEAST_ROUNDS)
    config = steps.StepBenchConfig(**_shape(args), batch_size=args.batch)
    return guard_cost.run(config, args.steps, progress.say)


def _run_model(args: argparse.Namespace) -> dict[str, Any]:
    shape = _shape(args)
    from rag_mm.perf.bench import steps, torch_peer

    torch_peer.load()  # Its absence is found before minutes of work.
    if args.what == "train":
        config = steps.StepBenchConfig(
            **shape, batch_size=args.batch, with_compiled=not args.no_compiled
        )
        return steps.train(config, progress.say)
    if min(args.batches) < 1 or args.new >= args.length:
        raise UserError("--batches are at least 1, and --new leaves room for a prompt in --length.")
    config = steps.StepBenchConfig(**shape, batch_sizes=tuple(args.batches), num_new=args.new)
    return steps.decode(config, progress.say)


def _shape(args: argparse.Namespace) -> dict[str, Any]:
    """What comparisons of small decoders share.

    Raises:
        UserError: a width that does not split into heads of 32.
    """
    if any(width < 32 or width % 32 for width in args.widths):
        raise UserError(f"--widths are multiples of 32, not {args.widths}.")
    return dict(
        widths=tuple(args.widths),
        num_layers=args.layers,
        length=args.length,
        num_threads=args.threads,
        num_rounds=args.rounds,
    )


def _check_least(args: argparse.Namespace, **least: int) -> None:
    for name, value in least.items():
        given = getattr(args, name, None)
        if given is not None and given < value:
            raise UserError(f"--{name.replace('_', '-')} is {given}; give at least {value}.")


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """One line a case."""
    table = rich.table.Table(box=None)
    for name in ("case", "ours", "peer", "ratio", "unit", "recall"):
        table.add_column(name)
    for name, case in result.items():
        recalls = [case[key] for key in ("our_recall", "peer_recall") if key in case]
        numbers = [_format(case[key], ".4g") for key in ("ours", "peer")]
        ratio = _format(case["ratio"], ".4f" if "ci95" in case else ".2f")
        if "ci95" in case:
            ratio += " ({:.4f} to {:.4f})".format(*case["ci95"])
        cells = [name, *numbers, ratio, case["unit"]]
        table.add_row(*cells, " / ".join(f"{recall:.3f}" for recall in recalls))
    console.print(table)


def _format(number: float | None, how: str) -> str:
    return "none" if number is None else format(number, how)
