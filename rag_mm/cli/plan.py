"""`rag-mm plan`: ahead-of-time compilation for a TPU topology: memory, collectives and an MFU bound."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import rich.console
import rich.table

from rag_mm.core import configuration
from rag_mm.core.errors import UserError

if TYPE_CHECKING:
    from rag_mm.perf import chips
    from rag_mm.perf.plan import programs

_COMPILERS_COUNT = "the compiler's count of FLOPs without remat's recomputation"
# A program, the same with other (remat, parts), and the kinds of remat that there are.
_Planned = tuple["programs.Program", Callable[[str, int], "programs.Program | None"], Sequence[str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm plan`."""
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--config",
        metavar="PAGE[:PRESET]",
        help="config page, such as configs/cm3leon.py:7b, or configs/spae.py:base for its image tokenizer; "
        "override a value with --config.key=value",
    )
    target.add_argument(
        "--memory",
        metavar="ROWSxDIM",
        help="plan a search over a memory sharded across all chips, such as 1000000000x512",
    )
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SIDES",
        help="chip and slice shape, such as v5e:16x16 or v5p:4x4x4",
    )
    parser.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="number of slices joined by DCN (default: 1)",
    )
    parser.add_argument(
        "--batch", type=int, metavar="B", help="global batch size (default: the config's)"
    )
    parser.add_argument("--parts", type=int, metavar="N", help="microbatches per step")
    parser.add_argument(
        "--remat",
        choices=("none", "dots", "full"),
        help="rematerialization (default: full for decoders, else the config's)",
    )
    parser.add_argument(
        "--mesh",
        metavar="D,F,T",
        help="mesh axes data, fsdp, tensor (default: all chips of a slice on fsdp; for image tokenizers all "
        "chips on data)",
    )
    parser.add_argument(
        "--decode", type=int, nargs="?", const=-1, metavar="TOKENS",
        help="plan decoding of TOKENS tokens instead (default: 1024 or half the sequence length, if less), "
        "of an Emu the codes of images after captions of TOKENS tokens (default: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--encode", action="store_true",
        help="plan encoding of a batch by an image tokenizer instead of its training step",
    )  # fmt: skip
    parser.add_argument(
        "--documents",
        type=int,
        metavar="N",
        help="of a chain over a corpus, also reckon hours and bytes of all its commands for N documents",
    )
    parser.add_argument(
        "--search", action="store_true", help="find the largest batch and the least remat that fit"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compiles. Returns the plan as JSON values; a program that does not fit still exits with 0."""
    if args.documents is not None and (args.memory or args.decode is not None or args.encode):
        raise UserError(
            "--documents is for training steps; leave out --memory, --decode and --encode."
        )
    if args.memory:
        return _run_memory(args)
    if args.search and (args.decode is not None or args.encode):
        raise UserError("--search applies to training steps only; leave out --decode and --encode.")
    _set_environment()

    from rag_mm.perf import chips
    from rag_mm.perf.plan import chain_sizes, compile_plan

    topology = chips.parse_topology(args.topology, args.slices)
    page = configuration.to_dict(configuration.load_config(args.config))
    family = page.get("family")
    others = {"emu": _emu, "emu_visual": _emu_visual}
    chain = None if args.documents is None else _chain(args, topology)
    is_tokenizer = "stages" in page and not chain_sizes.is_chain(page)
    make = _image_tokenizer if is_tokenizer else others.get(family or "", _decoder)
    program, vary, remats = make(args, topology)
    if args.search:
        result = compile_plan.search(program, vary, remats, topology)
    else:
        result = compile_plan.make_plan(program, topology)
    return {"config": args.config, **result} | ({} if chain is None else {"chain": chain})


def _chain(args: argparse.Namespace, topology: "chips.Topology") -> dict[str, Any]:
    """What all commands of a chain's page take."""
    from rag_mm.perf.plan import chain_costs, chain_sizes

    page = configuration.to_dict(configuration.load_config(args.config))
    if not chain_sizes.is_chain(page):
        raise UserError(
            f"{args.config} is no chain over a corpus, which --documents needs, such as "
            "configs/cm3leon.py:7b."
        )
    from rag_mm.stages import chain_config

    values = chain_config.load(args.config, args.overrides)
    return chain_costs.reckon(values, args.documents, topology)


def _decoder(args: argparse.Namespace, topology: "chips.Topology") -> "_Planned":
    """The program of a page of a model's sizes, or of a chain that pretrains it."""
    from rag_mm.nn.block import REMAT
    from rag_mm.perf.plan import cases, chain_sizes

    config: Any = configuration.to_dict(configuration.load_config(args.config))
    if chain_sizes.is_chain(config):
        from rag_mm.stages import chain_config

        config = chain_sizes.model_page(chain_config.load(args.config, args.overrides))
    else:
        config = configuration.to_dict(configuration.load_config(args.config, args.overrides))
    missing = [key for key in ("family", "model", "batch_size") if key not in config]
    if missing:
        raise UserError(
            f"{args.config} has no {missing[0]!r}; plan needs a config page of a single model, "
            "such as configs/cm3leon.py:7b."
        )
    if args.encode:
        raise UserError("--encode is for image tokenizers; leave it out, or give --decode.")
    case = cases.make_case(
        config,
        topology,
        batch_size=args.batch,
        num_parts=args.parts,
        remat=args.remat,
        mesh=args.mesh,
        num_new=args.decode,
    )
    vary = partial(cases.vary, case, topology)
    return cases.make_program(case, topology), vary, tuple(REMAT)


def _emu(args: argparse.Namespace, topology: "chips.Topology") -> "_Planned":
    """The program of a page of an Emu's sizes."""
    from rag_mm.perf.plan import cases, emu_programs, rollout_programs

    if args.encode:
        raise UserError("--encode is for image tokenizers; leave it out, or give --decode.")
    case = emu_programs.make_case(
        configuration.to_dict(configuration.load_config(args.config, args.overrides)),
        topology,
        batch_size=None if args.decode else args.batch,
        num_parts=args.parts,
        remat=args.remat,
        mesh=None if args.decode else args.mesh,
    )
    if args.decode:
        rolled = rollout_programs.make_case(
            case.page,
            topology,
            prompt_len=rollout_programs.PROMPT_LEN if args.decode == -1 else args.decode,
            batch_size=args.batch,
            mesh_shape=None if args.mesh is None else cases.parse_mesh(args.mesh),
        )
        return rollout_programs.make_program(rolled), lambda remat, parts: None, ()
    vary = partial(emu_programs.vary, case, topology)
    return emu_programs.make_program(case), vary, ("none", "full")


def _emu_visual(args: argparse.Namespace, topology: "chips.Topology") -> "_Planned":
    """The program of a page of a visual decoder's sizes."""
    from rag_mm.perf.plan import cases, visual_programs

    if args.encode or args.decode is not None or args.remat not in (None, "none"):
        raise UserError(
            f"{args.config} is planned for training without remat alone; leave out --encode, --decode and "
            "--remat."
        )
    case = visual_programs.make_case(
        configuration.to_dict(configuration.load_config(args.config, args.overrides)),
        topology,
        batch_size=args.batch,
        num_parts=args.parts,
        mesh_shape=None if args.mesh is None else cases.parse_mesh(args.mesh),
    )
    vary = partial(visual_programs.vary, case, topology)
    return visual_programs.make_program(case, topology), vary, ("none",)


def _image_tokenizer(args: argparse.Namespace, topology: "chips.Topology") -> "_Planned":
    """The program of the stage `spae` of a chain's page."""
    from rag_mm.perf.plan import cases
    from rag_mm.stages import chain_config
    from rag_mm.stages.spae import plan_step

    page = chain_config.load(args.config, args.overrides)
    if plan_step.NAME not in page["stages"]:
        raise UserError(
            f"{args.config} has no stage {plan_step.NAME!r}; plan needs a config page of a single model, "
            "such as configs/cm3leon.py:7b, or of an image tokenizer, such as configs/spae.py:base."
        )
    if args.decode is not None:
        raise UserError("--decode is for decoders; leave it out, or give --encode.")
    case = plan_step.make_case(
        page,
        topology,
        batch_size=args.batch,
        num_parts=args.parts,
        remat=args.remat,
        mesh=None if args.mesh is None else cases.parse_mesh(args.mesh),
        is_encoding=args.encode,
    )
    vary = partial(plan_step.vary, case, topology)
    return plan_step.make_program(case, topology), vary, plan_step.REMATS


def _run_memory(args: argparse.Namespace) -> dict[str, Any]:
    match = re.fullmatch(r"(\d{1,15})x(\d{1,6})", args.memory)
    if match is None or not all(int(size) for size in match.groups()):
        raise UserError(f"--memory={args.memory} is not ROWSxDIM, such as 1000000000x512.")
    _set_environment()

    from rag_mm.perf import chips
    from rag_mm.perf.plan import index_search

    topology = chips.parse_topology(args.topology, args.slices)
    return index_search.make_plan(int(match[1]), int(match[2]), topology)


def _set_environment() -> None:
    """Only libtpu's compiler is needed, even while another process has libtpu loaded."""
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the plan as a table, and whether it fits."""
    table = rich.table.Table(show_header=False, box=None)
    gib = lambda value: "-" if value is None else f"{value / (1 << 30):.2f} GiB"
    plain = ("program", "topology", "num_chips", "mesh", "batch_size", "num_parts", "remat")
    for key in (*plain, "rows_per_chip", "num_queries"):
        if key in result:
            table.add_row(key, str(result[key]))
    if "num_params" in result:
        table.add_row("parameters", f"{result['num_params'] / 1e9:.3g} B")
    for key in ("argument_bytes", "temp_bytes", "peak_bytes", "hbm_bytes"):
        if key in result:
            table.add_row(key.removesuffix("_bytes"), gib(result[key]))
    table.add_row("collectives", str({k: v for k, v in result["collectives"].items() if v}))
    if "seconds" in result:
        table.add_row("seconds", str({k: round(v, 4) for k, v in result["seconds"].items()}))
        from rag_mm.perf import flops

        counted = flops.CONVENTION if "flops_per_token" in result else _COMPILERS_COUNT
        table.add_row("MFU bound", f"{100 * result['mfu_bound']:.0f} % ({counted})")
    console.print(table)
    if "chain" in result:
        _show_chain(result, console)
    verdict = "It fits." if result["fits"] else f"It does not fit, by {gib(result['over_bytes'])}."
    console.print(verdict)


def _show_chain(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints hours and bytes of a chain's commands."""
    chain = result["chain"]
    share = f"{100 * chain['utilization']:.0f} %"
    table = rich.table.Table("command", "FLOPs", "hours at peak", f"hours at {share}", box=None)
    for name, costs in chain["commands"].items():
        hours = (f"{costs[key]:.3g}" for key in ("hours_at_peak", "hours"))
        table.add_row(name, f"{costs['flops']:.3g}", *hours)
    console.print(table)
    sizes = ", ".join(f"{name} {size / 1e9:,.4g} GB" for name, size in chain["bytes"].items())
    console.print(
        f"{chain['documents']:,} documents: {sizes}; each is trained on {chain['passes']:.3g} times. "
        "Reckoned without what hosts do; FLOPs of matrix products and convolutions, a multiply-add as two.",
        soft_wrap=True,
    )
