"""Runs a chain of stages in order; finished stages are skipped, interrupted ones resume."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from etils import epath

from rag_mm.core import (
    compilation_cache,
    configuration,
    files,
    progress,
    remote,
    reuse,
    run_folder,
)
from rag_mm.core.errors import UserError
from rag_mm.stages import chain_config, multiprocess
from rag_mm.stages.chain_config import slice_of
from rag_mm.stages.shared import given_models
from rag_mm.train import checkpoint


def run_chain(
    config: Mapping[str, Any],
    workdir: epath.PathLike,
    *,
    only: str | None = None,
    overwrite: bool = False,
    reuse_from: Sequence[epath.PathLike] = (),
    page_name: str | None = None,
) -> run_folder.Run:
    """Runs the stages of a config in order, or one of them.

    With several processes, all call it with the same arguments and a shared `workdir`
    (`stages.multiprocess`).

    Args:
        config: nested plain values, as `chain_config.load` returns; missing ones have their defaults.
        workdir: folder of the run; created if it does not exist.
        only: name of the only stage to run; None runs all.
        overwrite: rebuild stages whose config or inputs changed, instead of raising.
        reuse_from: runs whose finished stages are copied if config and inputs are the same.
        page_name: of the config page, kept for the run's model card.

    Raises:
        UserError: the config, the devices or the run are unsuitable (nothing has been changed then), or a
            stage raises one.
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
        compilation_cache.keep_programs()
        multiprocess.follow(
            run, {name: partial(_call, run, name, configs[name]) for name in chosen}
        )
        return run
    _check_place(run, configs)
    _check_inputs(run, chosen, configs)
    with multiprocess.leading(), run.locked():
        compilation_cache.keep_programs()
        for name in configs:
            # config.json describes every stage, so all must match it or be rebuilt.
            if not overwrite:
                run_folder.check_stage(
                    run, name, slice_of(configs[name]), _inputs(name, configs[name])
                )
        run.save_config(config)
        if page_name is not None:
            files.write_json(run.workdir / run_folder.PAGE, {"page": page_name})
        sources = [run_folder.Run(epath.Path(source)) for source in reuse_from]
        has_run = [_run_stage(run, name, configs[name], overwrite, sources) for name in chosen]
        finished = [name for name in configs if run.manifest(name) is not None]
        for name in chosen:
            finish, page = (
                chain_config.STAGES[name].finish,
                run.workdir / chain_config.STAGES[name].page,
            )
            if finish is not None and (any(has_run) or not page.exists()):
                finish(configs[name], run, finished)
    return run


def _check_mesh(name: str, config: Any) -> None:
    """Rejects a batch that does not fit the devices, before any stage runs."""
    make_mesh = chain_config.STAGES[name].mesh
    is_given = isinstance(config, given_models.GivenConfig) and config.folder is not None
    try:
        if make_mesh is not None and not is_given:
            make_mesh(config)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def _check_place(run: run_folder.Run, configs: Mapping[str, Any]) -> None:
    """Rejects a remote run that a stage cannot be in, or that cannot be reached, before any stage runs."""
    if not remote.is_remote(run.workdir):
        return
    for name, config in configs.items():
        if chain_config.STAGES[name].needs_disk(config):
            raise UserError(
                f"The files of the stage {name!r} must be on a file system, not in {run.workdir}; "
                "mount it, or give a local --workdir."
            )
    remote.check_run(run.workdir)
    remote.check_reached(run.workdir)


def _inputs(name: str, config: Any) -> tuple[str, ...]:
    return chain_config.STAGES[name].inputs_for(config)


def _check_inputs(run: run_folder.Run, chosen: list[str], configs: Mapping[str, Any]) -> None:
    """Rejects a stage whose inputs are neither finished nor run before it, or are what it would replace."""
    for position, name in enumerate(chosen):
        given_models.check_outside(configs[name], run, name)
        for needed in _inputs(name, configs[name]):
            if needed not in chosen[:position]:
                run.finished_stage(needed)


def _run_stage(
    run: run_folder.Run, name: str, config: Any, overwrite: bool, sources: Sequence[run_folder.Run]
) -> bool:
    """Runs, resumes or skips a stage. Returns whether there was anything to do."""
    stage = chain_config.STAGES[name]
    before = run.manifest(name)
    is_shared = stage.is_shared or stage.mesh is not None

    def work(*_: Any) -> Mapping[str, Any]:
        if is_shared:
            multiprocess.share(name)
        elif multiprocess.has_others():
            progress.say(f"{name}: running in process 0 while the others wait")
        metrics = _call(run, name, config)
        # Which earlier checkpoints are left depends on interruptions; the stage's outputs must not.
        checkpoint.keep_last(run.stage_dir(name) / checkpoint.FOLDER)
        return metrics

    if before is not None:
        progress.say(f"{name}: {'already done, checking' if before.is_done else 'resuming'}")
    else:
        identity = (run, name, slice_of(config), _inputs(name, config))
        source = next(
            (candidate for candidate in sources if reuse.reuse_stage(*identity, candidate)), None
        )
        progress.say(f"{name}: {f'reused from {source.workdir}' if source else 'starting'}")
    after = run_folder.run_stage(
        run,
        name,
        slice_of(config),
        _inputs(name, config),
        work,
        overwrite=overwrite,
        reports_on_others=stage.reports_on_others,
    )
    return before != after


def _call(run: run_folder.Run, name: str, config: Any) -> Mapping[str, Any]:
    return chain_config.STAGES[name].function(config, run, run.stage_dir(name))
