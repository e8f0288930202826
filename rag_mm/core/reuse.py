"""Finished stages taken over from another run, so that runs which differ late share what is early."""

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
    """Copies what `run_lib.run_stage` would make, if `source` finished it; whether it did.

    It is the same where config and input fingerprints are; `run_stage` then finds the stage done. A
    stage that was begun here is left alone, one that was edited there is not taken. What it cost comes
    with it, marked as borrowed.
    """
    with run.locked():
        manifest = source.manifest(stage)
        if manifest is None or not manifest.is_done or run.stage_dir(stage).exists():
            return False
        found = {name: run.manifest(name) for name in inputs}
        if manifest.inputs != {name: made.fingerprint for name, made in found.items() if made}:
            return False
        # A run of one stage, in which the copy is checked before it gets its name.
        place = run_folder.Run(run.workdir / f"{run_folder.TRASH}{uuid.uuid4().hex}")
        try:
            run_folder.check_stage(source, stage, config, inputs)
            _copy(source.stage_dir(stage), place.stage_dir(stage))
            place.finished_stage(stage)
        except UserError:
            return False
        costs.mark_reused(place.stage_dir(stage))
        place.stage_dir(stage).rename(run.stage_dir(stage))
        place.workdir.rmtree()
        return True


def _copy(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.is_dir():
            _copy(entry, target / entry.name)
        else:
            entry.copy(target / entry.name)
