"""Running a chain of stages in order: finished ones are skipped, interrupted ones resume."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from etils import epath

from rag_mm.core import compilation_cache, configuration, progress, reuse, run_folder
from rag_mm.core.errors import UserError
from rag_mm.stages import chain_config, multiprocess
from rag_mm.stages.chain_config import STAGES, slice_of


def run_chain(
    config: Mapping[str, Any],
    workdir: epath.PathLike,
    *,
    only: str | None = None,
    overwrite: bool = False,
    reuse_from: Sequence[epath.PathLike] = (),
) -> run_folder.Run:
    """Runs the stages of a config in order, or one of them.

    Several processes call it with the same arguments and one shared folder (`stages.multiprocess`).

    Args:
        config: nested plain values, as `chain_config.load` returns; what is missing has its default.
        workdir: the run; created if it does not exist.
        only: name of the one stage to run.
        overwrite: rebuild stages whose config or inputs changed, instead of refusing them.
        reuse_from: runs whose finished stages are copied where config and inputs are the same.

    Raises:
        UserError: the config, the devices or the run do not fit; nothing has been changed then.
    """
    run = run_folder.Run(epath.Path(workdir))
    config = configuration.to_dict(configuration.fill(config, chain_config.sections))
    configs = chain_config.stage_configs(config)
    if only is not None and only not in configs:
        raise UserError(f"The config has no stage {only!r}; it has {', '.join(configs)}.")
    chosen = list(configs) if only is None else [only]
    multiprocess.agree({"config": config, "only": only, "overwrite": overwrite})
    for name in chosen:
        _check_mesh(name, configs[name])
    if not multiprocess.is_leader():
        compilation_cache.keep_programs(run.workdir)
        multiprocess.follow(
            run, {name: partial(_call, run, name, configs[name]) for name in chosen}
        )
        return run
    if "memory" in chosen and "://" in str(run.workdir):
        raise UserError(
            f"A memory is built in a folder of a file system, not in {run.workdir}; mount it, or build the "
            "stages up to the memory elsewhere."
        )
    _check_inputs(run, chosen)
    with multiprocess.leading(), run.locked():
        compilation_cache.keep_programs(run.workdir)
        for name in configs:
            # config.json describes every stage, so all must match it, or be about to be rebuilt.
            if not overwrite:
                run_folder.check_stage(run, name, slice_of(configs[name]), STAGES[name].inputs)
        run.save_config(config)
        sources = [run_folder.Run(epath.Path(source)) for source in reuse_from]
        has_worked = [_run_stage(run, name, configs[name], overwrite, sources) for name in chosen]
        finished = [name for name in configs if run.manifest(name) is not None]
        for name in chosen:
            finish, page = STAGES[name].finish, run.workdir / STAGES[name].page
            if finish is not None and (any(has_worked) or not page.exists()):
                finish(configs[name], run, finished)
    return run


def _check_mesh(name: str, config: Any) -> None:
    """Refuses a batch that does not fit the devices before an earlier stage has spent time."""
    make_mesh = STAGES[name].mesh
    try:
        if make_mesh is not None:
            make_mesh(config)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _check_inputs(run: run_folder.Run, chosen: list[str]) -> None:
    """Refuses a stage whose inputs are neither finished nor run before it."""
    for place, name in enumerate(chosen):
        for needed in STAGES[name].inputs:
            if needed not in chosen[:place]:
                run.finished_stage(needed)


def _run_stage(
    run: run_folder.Run, name: str, config: Any, overwrite: bool, sources: Sequence[run_folder.Run]
) -> bool:
    """Runs, resumes or skips a stage; whether there was anything to do."""
    stage = STAGES[name]
    before = run.manifest(name)
    is_shared = stage.is_shared or stage.mesh is not None

    def work(*_: Any) -> Mapping[str, Any]:
        if is_shared:
            multiprocess.share(name)
        elif multiprocess.has_others():
            progress.say(f"{name}: running in process 0, the others wait")
        return _call(run, name, config)

    if before is not None:
        progress.say(f"{name}: {'already done, checking' if before.is_done else 'resuming'}")
    else:
        wanted = (run, name, slice_of(config), stage.inputs)
        source = next((each for each in sources if reuse.reuse_stage(*wanted, each)), None)
        progress.say(f"{name}: {f'reused from {source.workdir}' if source else 'starting'}")
    after = run_folder.run_stage(
        run,
        name,
        slice_of(config),
        stage.inputs,
        work,
        overwrite=overwrite,
        reports_on_others=stage.reports_on_others,
    )
    return before != after


def _call(run: run_folder.Run, name: str, config: Any) -> Mapping[str, Any]:
    return STAGES[name].function(config, run, run.stage_dir(name))
