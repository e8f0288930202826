"""`rag-mm bench`: speed as a ratio to a peer library in the same process, or to a published peak."""

import argparse
from typing import Any

import rich.console
import rich.table

from rag_mm.core import progress
from rag_mm.core.errors import UserError

# The options that each comparison reads, with their defaults; None: the model size decides.
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
    "tokenizer": {"torch": dict(size="base", batch=2, words=65_536, threads=2, rounds=5)},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmarks and their options."""
    benchmarks = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    memory = benchmarks.add_parser(
        "memory", help="index build and search compared with FAISS (extra [bench])"
    )
    memory.add_argument(
        "--rows", type=int, default=300_000, help="number of vectors (default: 300000)"
    )
    memory.add_argument("--dim", type=int, default=512, help="vector dimension (default: 512)")
    memory.add_argument(
        "--recall", type=float, default=0.95, help="target recall@10 of both sides (default: 0.95)"
    )
    memory.add_argument(
        "--small",
        type=int,
        default=0,
        help="also time the build of a memory of this many vectors (default: none)",
    )
    memory.add_argument(
        "--hnsw", action="store_true", help="also run FAISS HNSW, which is slow to build"
    )
    memory.add_argument("--threads", type=int, default=2, help="threads of both sides (default: 2)")
    memory.add_argument(
        "--rounds", type=int, default=5, help="rounds; the median counts (default: 5)"
    )
    train = benchmarks.add_parser(
        "train", help="training step compared with a peer library or a published peak"
    )
    decode = benchmarks.add_parser(
        "decode", help="greedy decoding compared with a peer library or a published peak"
    )
    for model in (train, decode):
        peers = list(SETTINGS[model.prog.split()[-1]])
        model.add_argument(
            "--against",
            choices=peers,
            default="transformers",
            help="transformers: PyTorch (extra [parity]), the default"
            + ("; unguarded: the step without the update guard" if model is train else "")
            + "; peak: the device's published peak",
        )
        model.add_argument(
            "--size", choices=["tiny", "1.3b", "7b"], help="model size, peak only (default: 1.3b)"
        )
        model.add_argument(
            "--length", type=int, help="sequence length (default: 152; peak decoding: 1024)"
        )
        model.add_argument("--layers", type=int, help="decoder layers (default: 4)")
        model.add_argument("--threads", type=int, help="threads of both sides (default: 2)")
        model.add_argument(
            "--rounds", type=int, help="rounds; the median counts (default: 5; unguarded: 40)"
        )
    corpus = benchmarks.add_parser(
        "corpus", help="rows per second that training reads from a generated corpus"
    )
    corpus.add_argument(
        "--documents", type=int, default=20_000, help="documents of the corpus (default: 20000)"
    )
    corpus.add_argument("--codes", type=int, default=1024, help="codes per image (default: 1024)")
    corpus.add_argument(
        "--num-rows", type=int, default=1024, help="rows of 4096 tokens to load (default: 1024)"
    )
    corpus.add_argument(
        "--num-workers", type=int, default=0, help="processes that make rows (default: 0, a thread)"
    )
    _add_tokenizer(benchmarks.add_parser("tokenizer", help="image tokenizer compared with PyTorch"))
    train.add_argument("--widths", type=int, nargs="+", help="decoder widths (default: 192 768)")
    train.add_argument(
        "--batch", type=int, help="batch size (default: 48; peak: 8 for 1.3b, 4 for 7b)"
    )
    train.add_argument("--steps", type=int, help="steps per timing (default: unguarded 1, peak 10)")
    train.add_argument(
        "--no-compiled",
        action="store_true",
        default=None,
        help="leave out torch.compile, which needs a C++ compiler",
    )
    train.add_argument(
        "--remat",
        choices=["none", "dots", "full"],
        help="rematerialization, peak only (default: dots for 1.3b, full for 7b)",
    )
    train.add_argument(
        "--loss-chunks", type=int, help="chunks of the logits in the loss, peak only (default: 8)"
    )
    decode.add_argument("--widths", type=int, nargs=1, help="decoder width (default: 192)")
    decode.add_argument("--batches", type=int, nargs="+", help="batch sizes (default: 1 4 16)")
    decode.add_argument(
        "--new", type=int, help="new tokens (default: 64; peak: half the sequence length)"
    )


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against", choices=["torch"], default="torch", help="torch: a plain port (extra [parity])"
    )
    parser.add_argument(
        "--size", choices=["tiny", "base"], help="model: SPAE's, or a small one (default: base)"
    )
    parser.add_argument("--batch", type=int, help="images at a time (default: 2)")
    parser.add_argument(
        "--words", type=int, help="words of the codebook whose search is timed (default: 65536)"
    )
    parser.add_argument("--threads", type=int, help="threads of both sides (default: 2)")
    parser.add_argument("--rounds", type=int, help="rounds; the median counts (default: 5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures. Returns the cases by name, each with `ours`, `peer`, `ratio`, `machine`, `versions`."""
    if args.what == "memory":
        return _run_memory(args)
    if args.what == "corpus":
        return _run_corpus(args)
    _fill_defaults(args)
    _check_minimum(args, rounds=1, threads=1, layers=1, length=2, batch=1, steps=1, loss_chunks=1)
    _check_minimum(args, new=1, words=1)
    if args.what == "tokenizer":
        return _run_tokenizer(args)
    measure = {"peak": _run_peak, "unguarded": _run_unguarded, "transformers": _run_model}
    return measure[args.against](args)


def _fill_defaults(args: argparse.Namespace) -> None:
    """Fills in the defaults of this comparison and refuses options that it does not read."""
    comparisons = SETTINGS[args.what]
    for name in sorted({name for settings in comparisons.values() for name in settings}):
        is_read = name in comparisons[args.against]
        if getattr(args, name) is None:
            setattr(args, name, comparisons[args.against][name] if is_read else None)
        elif not is_read:
            option = name.replace("_", "-")
            readers = ", ".join(peer for peer, settings in comparisons.items() if name in settings)
            raise UserError(
                f"--{option} does not apply to --against={args.against}, only to {readers}."
            )


def _run_memory(args: argparse.Namespace) -> dict[str, Any]:
    _check_minimum(args, threads=1, rounds=1, rows=1_000, dim=8, small=0)
    if args.dim % 2 or not 0 < args.recall < 1:
        raise UserError("--dim must be even and --recall between 0 and 1.")
    from rag_mm.perf.bench import faiss_peer, indexes

    faiss_peer.load()  # Reports a missing library before minutes of work.
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


def _run_corpus(args: argparse.Namespace) -> dict[str, Any]:
    _check_minimum(args, documents=100, codes=4, num_rows=1, num_workers=0)
    from rag_mm.perf.bench import corpus_loading

    return corpus_loading.run(
        args.documents, args.codes, args.num_rows, num_workers=args.num_workers
    )


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


def _run_tokenizer(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.models.spae.spae_config import SPAEConfig
    from rag_mm.perf.bench import tokenizer_speed, torch_peer

    torch_peer.load()
    small = SPAEConfig(image_size=32, width=16, embed_dim=8, codebook_size=64, levels=(1, 2, 4, 4))
    config = tokenizer_speed.TokenizerBenchConfig(
        SPAEConfig.base() if args.size == "base" else small,
        batch_size=args.batch,
        num_words=args.words,
        num_threads=args.threads,
        num_rounds=args.rounds,
    )
    return tokenizer_speed.run(config, progress.say)


def _run_unguarded(args: argparse.Namespace) -> dict[str, Any]:
    from rag_mm.perf.bench import guard_cost, steps, timing

    _check_minimum(args, rounds=timing.LEAST_ROUNDS)
    config = steps.StepBenchConfig(**_shape(args), batch_size=args.batch)
    return guard_cost.run(config, args.steps, progress.say)


def _run_model(args: argparse.Namespace) -> dict[str, Any]:
    shape = _shape(args)
    from rag_mm.perf.bench import steps, torch_peer

    torch_peer.load()  # Reports a missing library before minutes of work.
    if args.what == "train":
        config = steps.StepBenchConfig(
            **shape, batch_size=args.batch, with_compiled=not args.no_compiled
        )
        return steps.train(config, progress.say)
    if min(args.batches) < 1 or args.new >= args.length:
        raise UserError(
            "--batches must be at least 1, and --new less than --length, which includes the prompt."
        )
    config = steps.StepBenchConfig(**shape, batch_sizes=tuple(args.batches), num_new=args.new)
    return steps.decode(config, progress.say)


def _shape(args: argparse.Namespace) -> dict[str, Any]:
    """The config fields that comparisons of small decoders share.

    Raises:
        UserError: a width is not a multiple of 32, the head dimension.
    """
    if any(width < 32 or width % 32 for width in args.widths):
        raise UserError(f"--widths must be multiples of 32, not {args.widths}.")
    return dict(
        widths=tuple(args.widths),
        num_layers=args.layers,
        length=args.length,
        num_threads=args.threads,
        num_rounds=args.rounds,
    )


def _check_minimum(args: argparse.Namespace, **minimums: int) -> None:
    for name, minimum in minimums.items():
        value = getattr(args, name, None)
        if value is not None and value < minimum:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give at least {minimum}.")


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints one line per case."""
    if "peak_gib" in result:
        for name, value in result.items():
            console.print(f"{name:<20} {value}", markup=False)
        return
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
    for counted in {case["counted"] for case in result.values() if "counted" in case}:
        console.print(f"The ratio is the MFU, of {counted}.", markup=False)


def _format(number: float | None, spec: str) -> str:
    return "none" if number is None else format(number, spec)
