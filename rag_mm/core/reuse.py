"""Copies finished stages from another run, so that runs that differ only in late stages share early ones."""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from rag_mm.core import costs, run_folder
from rag_mm.core.errors import UserError


def reuse_stage(
    run: run_folder.Run,
    stage: str,
    config: Mapping[str, Any],
    inputs: Sequence[str],
    source: run_folder.Run,
) -> bool:
    """Copies the finished stage of `source` that `run_folder.run_stage` would otherwise build in `run`.

    The results are equal if the config and the input fingerprints are; `run_stage` then finds the stage
    finished. A stage that `run` has already started is not replaced, and one that was edited in `source` is
    not copied. Its costs are copied too, marked as `borrowed`.

    Returns:
        Whether the stage was copied.
    """
    with run.locked():
        manifest = source.manifest(stage)
        if manifest is None or not manifest.is_done or run.stage_dir(stage).exists():
            return False
        inputs_here = {name: run.manifest(name) for name in inputs}
        if manifest.inputs != {name: m.fingerprint for name, m in inputs_here.items() if m}:
            return False
        # The copy is checked in a temporary run before it is moved into place.
        temporary = run_folder.Run(run.workdir / f"{run_folder.TRASH}{uuid.uuid4().hex}")
        try:
            run_folder.check_stage(source, stage, config, inputs)
            _copy(source.stage_dir(stage), temporary.stage_dir(stage))
            temporary.finished_stage(stage)
        except UserError:
            return False
        costs.mark_reused(temporary.stage_dir(stage))
        temporary.stage_dir(stage).rename(run.stage_dir(stage))
        temporary.workdir.rmtree()
        return True


def _copy(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.is_dir():
            _copy(entry, target / entry.name)
        else:
            entry.copy(target / entry.name)
