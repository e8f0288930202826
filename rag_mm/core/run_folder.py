"""Run folders: stages with manifests and fingerprints, safe to kill, refusing changed inputs."""

import contextlib
import dataclasses
import fcntl
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import costs as clock
from rag_mm.core import digests, files
from rag_mm.core.errors import UserError

MANIFEST = "manifest.json"
# Key of metrics.json that holds what may differ between two runs of the same bits.
MACHINE = "machine"
_SIDE_FILES = (
    MANIFEST,
    clock.FILE_NAME,
    clock.SPEED_NAME,
    clock.PROFILE_NAME,
    clock.BOARD_NAME,
)
# Folders named so are deleted when the run is next changed.
TRASH = ".deleted-"
_ABSENT = object()

StageFn = Callable[["Run", epath.Path], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class StageManifest:
    """What a stage was made from and what it made.

    `config` is its slice of the config, `inputs` the input stages' fingerprints, `outputs` the
    digests of its files by content, `metrics` what it measured, nested by the stages spoken of.
    `status` is "running" or "done"; `fingerprint` hashes all of these and is empty until then.
    """

    stage: str
    status: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint: str = ""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self.status == "done"


@dataclasses.dataclass(frozen=True)
class Run:
    """One working directory. Making the object touches no disk; see `open_run`."""

    workdir: epath.Path

    def stage_dir(self, stage: str) -> epath.Path:
        """Folder of one stage, which need not exist."""
        if not re.fullmatch(r"[a-z][a-z0-9_]*", stage) or stage == MACHINE:
            raise ValueError(f"a stage has a lower-case name other than {MACHINE!r}, not {stage!r}")
        return self.workdir / stage

    def manifest(self, stage: str) -> StageManifest | None:
        """The stage's manifest, or None if it was never started."""
        path = self.stage_dir(stage) / MANIFEST
        if not path.exists():
            return None
        fields = files.read_json(path)
        try:
            return StageManifest(**fields)
        except TypeError:
            raise UserError(f"{path} is not a stage's manifest; delete {path.parent}.") from None

    def finished_stage(self, stage: str) -> epath.Path:
        """Folder of a stage that is done and whose files are as it left them.

        Raises:
            UserError: it is missing, unfinished or edited.
        """
        manifest = self.manifest(stage)
        if manifest is None or not manifest.is_done:
            state = "no" if manifest is None else "an unfinished"
            raise UserError(
                f"{self.workdir} has {state} stage {stage!r}; run rag-mm train on it first."
            )
        _verify_outputs(self, manifest)
        return self.stage_dir(stage)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config as nested dicts."""
        return files.read_json(self.workdir / "config.json")

    def save_config(self, config: Mapping[str, Any]) -> None:
        """Writes config.json; do so after `check_stage` passed for every stage of the config."""
        files.write_json(self.workdir / "config.json", config)

    @property
    def metrics(self) -> dict[str, Any]:
        """Everything measured, by stage; key "machine" holds times, memory and machine by stage."""
        path = self.workdir / "metrics.json"
        return files.read_json(path) if path.exists() else {}

    def save_costs(self, name: str, stages: Sequence[str], **more: float) -> None:
        """Puts the stages' wall seconds, added up, and their peak memory under `name` in metrics.json.

        Borrowed stages count as if made here; `borrowed_seconds` is what another run spent of it.
        `more` are further costs, which like these may differ between two runs of the same bits.
        """
        costs = [clock.summary(self.stage_dir(stage)) for stage in stages]
        total = {
            "wall_seconds": round(sum(cost["wall_seconds"] for cost in costs), 1),
            "borrowed_seconds": round(sum(cost["borrowed_seconds"] for cost in costs), 1),
            "peak_rss_gib": round(max(cost["peak_rss_mb"] for cost in costs) / 1024, 3),
        }
        _merge_metrics(self, {name: total | more}, {})

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from changing this run; a kill releases it. May be nested.

        Raises:
            UserError: another process holds it, or the folder cannot be made.
        """
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.workdir} cannot be made: {error.strerror or error}.") from error
        if not os.path.isdir(self.workdir) or str(self.workdir.resolve()) in _held:
            yield  # Remote folders have no locks.
            return
        name = str(self.workdir.resolve())
        try:
            file = open(self.workdir / ".lock", "w")  # noqa: SIM115 - a generator's finally closes it.
        except OSError as error:
            raise UserError(
                f"{self.workdir} cannot be written: {error.strerror or error}."
            ) from error
        try:
            try:
                # A record lock: children that were forked do not keep it alive.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"{self.workdir} is being changed by another process; wait for it or end it."
                ) from None
            _held.add(name)
            yield
        finally:
            _held.discard(name)
            file.close()


_held: set[str] = set()


def open_run(workdir: epath.PathLike) -> Run:
    """A run that exists.

    Raises:
        UserError: the folder has no config.json.
    """
    run = Run(epath.Path(workdir))
    if not (run.workdir / "config.json").exists():
        raise UserError(f"{workdir} is not a run: it has no config.json.")
    return run


def check_stage(
    run: Run, stage: str, config: Mapping[str, Any], inputs: Sequence[str] = ()
) -> None:
    """Refuses what `run_stage` would refuse, touching nothing; inputs not yet made are passed over.

    Raises:
        UserError: see `run_stage`.
    """
    manifest = run.manifest(stage)
    if manifest is None:
        return
    reason = _why_stale(run, manifest, _plain(config), inputs)
    if reason:
        raise UserError(reason)


def run_stage(
    run: Run,
    stage: str,
    config: Mapping[str, Any],
    inputs: Sequence[str],
    fn: StageFn,
    overwrite: bool = False,
    reports_on_others: bool = False,
) -> StageManifest:
    """Makes one stage, or does nothing if it is done and nothing it depends on has changed.

    `fn(run, stage_dir)` writes into `stage_dir` and returns metrics: nested dicts of numbers,
    strings, booleans and lists; NaN and infinity become null. After a kill it is called again in
    the same folder, goes on from what lies there, and ends with the same files and metrics.

    Args:
        config: the slice of the config that this stage depends on.
        inputs: stages it reads; each must be done and its files untouched.
        overwrite: rebuild the stage where it would be refused.
        reports_on_others: the metrics are nested by the stages they speak of, and stand beside theirs.

    Raises:
        UserError: an input is missing, unfinished or edited; or the stage was made from another
            config or other inputs, or its own files were edited, and `overwrite` is false.
    """
    config = _plain(config)
    with run.locked():
        _empty_trash(run)
        for name in inputs:
            run.finished_stage(name)
        old = run.manifest(stage)
        if old is not None:
            reason = _why_stale(run, old, config, inputs)
            if reason and not overwrite:
                raise UserError(reason)
            if reason:
                _delete(run, stage)
            elif old.is_done:
                # A borrowed stage says it here for the first time, and what one says of other stages
                # went with them where these were rebuilt since.
                _merge_metrics(run, old.metrics, {stage: clock.summary(run.stage_dir(stage))})
                return old
        manifest = StageManifest(stage, "running", config, _fingerprints(run, inputs))
        return _execute(run, manifest, fn, reports_on_others)


def _execute(
    run: Run, manifest: StageManifest, fn: StageFn, reports_on_others: bool
) -> StageManifest:
    stage_dir = run.stage_dir(manifest.stage)
    is_new = not stage_dir.exists()
    if not is_new:
        _remove_unfinished(stage_dir)
    _write_manifest(stage_dir, manifest)
    try:
        with clock.timed(stage_dir):
            metrics = fn(run, stage_dir)
    except UserError as error:
        # The remedy is often another config, which a half-made stage would refuse; where a disk is full
        # it is the same config again, which goes on from what lies there.
        if is_new and not isinstance(error.__cause__, OSError):
            _delete(run, manifest.stage)
        raise
    outputs = digests.folder_digests(stage_dir, exclude=_SIDE_FILES)
    metrics = _plain(metrics) if reports_on_others else {manifest.stage: _plain(metrics)}
    manifest = dataclasses.replace(manifest, status="done", outputs=outputs, metrics=metrics)
    manifest = dataclasses.replace(manifest, fingerprint=_fingerprint(manifest))
    # Metrics first: killed between the two, the stage runs again and gives the same ones.
    _merge_metrics(run, metrics, {manifest.stage: clock.summary(stage_dir)})
    _write_manifest(stage_dir, manifest)
    return manifest


def _why_stale(
    run: Run, manifest: StageManifest, config: Mapping[str, Any], inputs: Sequence[str]
) -> str:
    stage, remedy = manifest.stage, "rebuild it with --overwrite or choose another --workdir"
    changed = _first_difference(manifest.config, config)
    if changed:
        return f"Stage {stage!r} was made with another config ({changed}); {remedy}."
    if sorted(manifest.inputs) != sorted(inputs):
        old, new = (", ".join(sorted(names)) or "none" for names in (manifest.inputs, inputs))
        return f"Stage {stage!r} was made from the stages {old}, not {new}; {remedy}."
    for name, fingerprint in manifest.inputs.items():
        current = run.manifest(name)
        if current is not None and current.is_done and current.fingerprint != fingerprint:
            return (
                f"Stage {stage!r} was made from another {name!r} than the one there now; {remedy}."
            )
    if manifest.is_done:
        try:
            _verify_outputs(run, manifest)
        except UserError as error:
            return str(error)
    return ""


def _verify_outputs(run: Run, manifest: StageManifest) -> None:
    stage = manifest.stage
    remedy = "restore it or rebuild the stage with --overwrite"
    try:
        found = digests.folder_digests(run.stage_dir(stage), exclude=_SIDE_FILES)
    except UserError as error:
        raise UserError(
            f"Stage {stage!r} was edited after it was done: {error} So {remedy}."
        ) from None
    differing = sorted(found.items() ^ manifest.outputs.items())
    if differing:
        name = differing[0][0]
        raise UserError(f"Stage {stage!r} was edited after it was done ({name} differs); {remedy}.")
    if _fingerprint(manifest) != manifest.fingerprint:
        raise UserError(f"Stage {stage!r} has an edited {MANIFEST}; {remedy}.")


def _fingerprint(manifest: StageManifest) -> str:
    content = {
        "stage": manifest.stage,
        "config": manifest.config,
        "inputs": manifest.inputs,
        "outputs": manifest.outputs,
        "metrics": manifest.metrics,
    }
    return files.digest(files.canonical_json(content).encode())


def _fingerprints(run: Run, stages: Sequence[str]) -> dict[str, str]:
    manifests = {name: run.manifest(name) for name in stages}
    return {name: manifest.fingerprint for name, manifest in manifests.items() if manifest}


def _first_difference(old: Any, new: Any, prefix: str = "") -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            values = old.get(key, _ABSENT), new.get(key, _ABSENT)
            if text := _first_difference(*values, f"{prefix}{key}."):
                return text
        return ""
    if old == new:
        return ""
    before, now = ("absent" if value is _ABSENT else repr(value) for value in (old, new))
    return f"{prefix[:-1]} was {before}, now {now}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray) or hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_manifest(stage_dir: epath.Path, manifest: StageManifest) -> None:
    files.write_json(stage_dir / MANIFEST, dataclasses.asdict(manifest))


def _merge_metrics(run: Run, metrics: Mapping[str, Any], costs: Mapping[str, Any]) -> None:
    merged = _merge(run.metrics, {**metrics, MACHINE: costs})
    files.write_json(run.workdir / "metrics.json", merged)


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`new` over `old`, tables in both joined two levels deep: a figure is replaced whole."""
    joined = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
        joined[key] = {**old[key], **value} if both else value
    return joined


def _delete(run: Run, stage: str) -> None:
    metrics = run.metrics
    if metrics.pop(stage, None) is not None or stage in metrics.get(MACHINE, {}):
        metrics.get(MACHINE, {}).pop(stage, None)
        files.write_json(run.workdir / "metrics.json", metrics)
    # Moved away in one step, so that a kill never leaves half a stage under its name.
    trash = run.workdir / f"{TRASH}{uuid.uuid4().hex}"
    run.stage_dir(stage).rename(trash)
    trash.rmtree()


def _empty_trash(run: Run) -> None:
    for entry in run.workdir.iterdir():
        if entry.name.startswith(TRASH):
            entry.rmtree()


def _remove_unfinished(stage_dir: epath.Path) -> None:
    # Names that files.write_atomic gives to files it has not finished; it makes them on local disks only.
    for folder, _, names in os.walk(stage_dir):
        for name in names:
            if re.fullmatch(r"\..+\.[a-z0-9_]{8}", name):
                os.unlink(os.path.join(folder, name))
