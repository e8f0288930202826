"""`rag-mm train`: runs a config's stages in order, or one of them; finished stages are skipped."""

import argparse
from typing import Any

import rich.console

from rag_mm.cli import process_args, show_config
from rag_mm.core import configuration
from rag_mm.core.errors import UserError

TRACKERS = ("trackio", "wandb")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm train`."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="PAGE[:PRESET]",
        help="config page, such as configs/quickstart.py:quick; override a value with --config.key=value",
    )
    parser.add_argument("--workdir", metavar="RUN", help="run folder, created if missing")
    parser.add_argument(
        "--show",
        action="store_true",
        help="print every value of the config with its meaning, and run nothing",
    )
    parser.add_argument("--stage", help="run only this stage")
    parser.add_argument(
        "--profile",
        metavar="A:B",
        help="profile steps A to B of each training stage; TensorBoard traces go to the stage's profile/",
    )
    parser.add_argument(
        "--tracker",
        choices=TRACKERS,
        help="send the log lines of each training stage to this experiment tracker, which must be installed",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="rebuild stages whose config or inputs changed"
    )
    parser.add_argument(
        "--reuse",
        nargs="+",
        default=(),
        metavar="RUN",
        help="copy finished stages with the same config and inputs from these runs",
    )
    process_args.add_arguments(
        parser, "Several processes train one model. Start each with the same command and --workdir."
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the stages. Returns `workdir` and `metrics`, every metric measured in the run so far.

    With `--show` it returns what `show_config.run` does.
    """
    if args.show:
        return show_config.run(args)
    if args.workdir is None:
        raise UserError(
            "The following arguments are required: --workdir (see rag-mm train --help)."
        )
    if not args.workdir:
        raise UserError("--workdir is empty. Give the run folder.")
    process_args.check_arguments(args)
    profile_steps = _read_profile_steps(args.profile)
    configuration.load_config(args.config)  # A mistyped name is refused before jax is imported.

    from rag_mm.stages import chain, chain_config
    from rag_mm.train import loop, tracking

    config = chain_config.load(args.config, args.overrides)
    # Check every stage before joining the other processes, which would wait for a failed one.
    chain_config.stage_configs(config)
    destination = None
    if args.tracker is not None:
        destination = tracking.Destination(tracking.find(args.tracker), config)
    with (
        process_args.joined(args),
        loop.profiled(profile_steps),
        tracking.tracked(destination),
    ):
        finished = chain.run_chain(
            config,
            args.workdir,
            only=args.stage,
            overwrite=args.overwrite,
            page_name=args.config,
            reuse_from=args.reuse,
        )
    return {"workdir": args.workdir, "metrics": finished.metrics}


def _read_profile_steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise UserError(
            f"--profile={text} is not FIRST:LAST with 0 < FIRST <= LAST, such as 10:12."
        )
    return int(first), int(last)


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints the path of the metrics file, or the config."""
    if "settings" in result:
        show_config.show(result, console)
        return
    console.print(f"Metrics: {result['workdir']}/metrics.json", markup=False, soft_wrap=True)
