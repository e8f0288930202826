"""`rag-mm plan`: a step or a search compiled for TPUs that are not here: does it fit, and what bounds it."""

import argparse
import os
import re
from typing import Any

import rich.console
import rich.table

from rag_mm.core import configuration
from rag_mm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config",
        metavar="PAGE[:PRESET]",
        help="such as configs/cm3leon.py:7b; single values by --config.key=value",
    )
    what.add_argument(
        "--memory",
        metavar="ROWSxDIM",
        help="the search of a memory over all chips instead, such as 1000000000x512",
    )
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SIDES", help="such as v5e:16x16 or v5p:4x4x4"
    )
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="slices joined by DCN")
    parser.add_argument(
        "--batch", type=int, metavar="ROWS", help="rows of a step, all chips together"
    )
    parser.add_argument("--parts", type=int, metavar="N", help="parts a step cuts its batch into")
    parser.add_argument("--remat", choices=("none", "dots", "full"), help="default: full")
    parser.add_argument(
        "--mesh",
        metavar="D,F,T",
        help="data, fsdp, tensor; default: all chips of a slice under fsdp",
    )
    parser.add_argument(
        "--decode", type=int, nargs="?", const=-1, metavar="TOKENS",
        help="plan decoding of so many tokens instead (default: 1024, or half a row)",
    )  # fmt: skip
    parser.add_argument(
        "--search", action="store_true", help="find the largest batch and leanest remat that fit"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The plan as plain values; it is done, exit code 0, also where the program does not fit."""
    if args.memory:
        return _run_memory(args)
    config = configuration.to_dict(configuration.load_config(args.config, args.overrides))
    missing = [key for key in ("family", "model", "batch_size") if key not in config]
    if missing:
        raise UserError(
            f"{args.config} has no {missing[0]!r}: a plan is made of a page of one model's sizes, "
            "such as configs/cm3leon.py:7b."
        )
    _set_environment()

    from rag_mm.perf import chips
    from rag_mm.perf.plan import cases, compile_plan

    topology = chips.parse_topology(args.topology, args.slices)
    case = cases.make_case(
        config,
        topology,
        batch_size=args.batch,
        num_parts=args.parts,
        remat=args.remat,
        mesh=args.mesh,
        num_new=args.decode,
    )
    if args.search and case.num_new:
        raise UserError("--search is for training steps; leave --decode out.")
    result = (
        compile_plan.search(case, topology)
        if args.search
        else compile_plan.make_plan(case, topology)
    )
    return {"config": args.config, **result}


def _run_memory(args: argparse.Namespace) -> dict[str, Any]:
    found = re.fullmatch(r"(\d{1,15})x(\d{1,6})", args.memory)
    if found is None or not all(int(size) for size in found.groups()):
        raise UserError(f"--memory={args.memory} does not read as ROWSxDIM; write 1000000000x512.")
    _set_environment()

    from rag_mm.perf import chips
    from rag_mm.perf.plan import index_search

    topology = chips.parse_topology(args.topology, args.slices)
    return index_search.make_plan(int(found[1]), int(found[2]), topology)


def _set_environment() -> None:
    """The compiler alone is wanted, beside other processes that may hold it."""
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints a table and one sentence."""
    table = rich.table.Table(show_header=False, box=None)
    gib = lambda value: "-" if value is None else f"{value / (1 << 30):.2f} GiB"
    plain = ("program", "topology", "num_chips", "mesh", "batch_size", "num_parts", "remat")
    for key in (*plain, "rows_per_chip", "num_queries"):
        if key in result:
            table.add_row(key, str(result[key]))
    if "num_params" in result:
        table.add_row("parameters", f"{result['num_params'] / 1e9:.2f} B")
    for key in ("argument_bytes", "temp_bytes", "peak_bytes", "hbm_bytes"):
        if key in result:
            table.add_row(key.removesuffix("_bytes"), gib(result[key]))
    table.add_row("collectives", str({k: v for k, v in result["collectives"].items() if v}))
    if "seconds" in result:
        table.add_row("seconds", str({k: round(v, 4) for k, v in result["seconds"].items()}))
        table.add_row("MFU bound", f"{100 * result['mfu_bound']:.0f} %")
    console.print(table)
    verdict = "It fits." if result["fits"] else f"It does not fit, by {gib(result['over_bytes'])}."
    console.print(verdict)
