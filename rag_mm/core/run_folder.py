"""Run folders: resumable stages with manifests and fingerprints that detect changed configs and inputs."""

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

from rag_mm.core import costs, digests, files, locks, progress, remote
from rag_mm.core.errors import UserError

MANIFEST = "manifest.json"
PAGE = "page.json"  # the name of the config page
# Key of metrics.json for values that may differ between two bitwise identical runs.
MACHINE = "machine"
_SIDE_FILES = (
    MANIFEST,
    costs.FILE_NAME,
    costs.SPEED_NAME,
    costs.PROFILE_NAME,
    costs.BOARD_NAME,
    costs.TRACKER_NAME,
)
# Folders whose names start like this are deleted when the run is next changed.
TRASH = ".deleted-"
_ABSENT = object()
# Names in a memory (memory/store/manifest.py): the files of a version, and the name of the newest one.
_VERSION, _CURRENT = re.compile(r"v\d{6}/"), "CURRENT"

StageFn = Callable[["Run", epath.Path], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class StageManifest:
    """What a stage was built from and what it produced.

    Attributes:
        stage: name of the stage.
        status: "running" or "done".
        config: the part of the config that the stage depends on.
        inputs: the fingerprint of each input stage.
        outputs: the content digest of each of its files.
        metrics: what it measured, keyed by the stage that the metrics describe.
        fingerprint: hash of all of the above except `status`; empty until the stage is done.
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
        """Whether the stage is finished."""
        return self.status == "done"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run: one working directory. Creating the object does not access the disk; see `open_run`."""

    workdir: epath.Path

    def stage_dir(self, stage: str) -> epath.Path:
        """Folder of one stage; it need not exist."""
        if not re.fullmatch(r"[a-z][a-z0-9_]*", stage) or stage == MACHINE:
            raise ValueError(f"a stage name is lower-case and not {MACHINE!r}, got {stage!r}")
        return self.workdir / stage

    def manifest(self, stage: str) -> StageManifest | None:
        """The stage's manifest, or None if it was never started."""
        path = self.stage_dir(stage) / MANIFEST
        if not path.exists():
            return None
        fields = files.read_json(path)
        try:
            manifest = StageManifest(**fields)
        except TypeError:
            manifest = None
        if manifest is None or not _is_valid(manifest, stage):
            raise UserError(f"{path} is not a valid stage manifest; delete {path.parent}.")
        return manifest

    def finished_stage(self, stage: str) -> epath.Path:
        """Folder of a finished stage, after verifying that its files are unchanged.

        Raises:
            UserError: the stage is missing, unfinished or was edited.
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
        return files.read_object(self.workdir / "config.json")

    def save_config(self, config: Mapping[str, Any]) -> None:
        """Writes config.json; call it only after `check_stage` passed for every stage of the config."""
        files.write_json(self.workdir / "config.json", config)

    @property
    def metrics(self) -> dict[str, Any]:
        """All metrics by stage; key "machine" holds time, memory and machine by stage. Empty if none.

        A damaged file stops nothing: each stage's metrics are in its manifest, too, and are merged in anew.
        """
        path = self.workdir / "metrics.json"
        try:
            values = files.read_object(path) if path.exists() else {}
        except UserError as error:
            progress.warn(f"{error} It is written anew.")
            values = {}
        return {key: value for key, value in values.items() if isinstance(value, dict)}

    def save_costs(self, name: str, stages: Sequence[str], **more: float) -> None:
        """Writes the total wall seconds and the peak memory of `stages` under `name` in metrics.json.

        Reused stages count as if built here; `borrowed_seconds` is the share that another run spent.
        `more` are further costs that, like these, may differ between two bitwise identical runs.
        """
        summaries = [costs.summary(self.stage_dir(stage)) for stage in stages]
        total = {
            "wall_seconds": round(sum(each["wall_seconds"] for each in summaries), 1),
            "borrowed_seconds": round(sum(each["borrowed_seconds"] for each in summaries), 1),
            "peak_rss_gib": round(max(each["peak_rss_mb"] for each in summaries) / 1024, 3),
        }
        _merge_metrics(self, {name: total | more}, {})

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the run against changes by other processes. Reentrant; a kill releases the lock.

        Raises:
            UserError: another process holds the lock, or the folder cannot be created or hold checkpoints.
        """
        _check_path(self.workdir)
        if remote.is_remote(self.workdir):  # It cannot be locked, and has no folders to be made.
            remote.check_reached(self.workdir)
            yield
            return
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.workdir} cannot be created: {error.strerror or error}."
            ) from error
        name = str(self.workdir.resolve())
        if name in _held:
            yield
            return
        try:
            file = files.open_lock(self.workdir / ".lock")
        except OSError as error:
            raise UserError(
                f"{self.workdir} cannot be written: {error.strerror or error}."
            ) from error
        try:
            # A POSIX record lock: forked children do not inherit it.
            if not locks.take(file, self.workdir, fcntl.lockf):
                raise UserError(
                    f"{self.workdir} is in use by another process; wait until it ends or stop it."
                )
            _held.add(name)
            yield
        finally:
            _held.discard(name)
            file.close()


_held: set[str] = set()


def _is_valid(manifest: StageManifest, stage: str) -> bool:
    """Whether the values of a manifest, which may be a stranger's, are of the types they should have."""
    tables = (manifest.config, manifest.inputs, manifest.outputs, manifest.metrics)
    return (
        all(isinstance(table, dict) for table in tables)
        and manifest.stage == stage
        and isinstance(manifest.status, str)
        and isinstance(manifest.fingerprint, str)
        and all(isinstance(value, str) for table in tables[1:3] for value in table.values())
    )


def open_run(workdir: epath.PathLike) -> Run:
    """Opens an existing run.

    Raises:
        UserError: the folder has no config.json, or cannot hold checkpoints.
    """
    _check_path(workdir)
    run = Run(epath.Path(workdir))
    if not (run.workdir / "config.json").exists():
        why = "it has no config.json" if epath.Path(workdir).exists() else "there is no such folder"
        raise UserError(f"{workdir} is not a run: {why}; rag-mm train or quickstart makes one.")
    return run


def _check_path(workdir: epath.PathLike) -> None:
    """Raises UserError for a path that TensorStore would read as another, or a remote one of no use."""
    path = os.fspath(workdir)
    remote.check_run(path)
    real = path if remote.is_remote(path) else os.path.realpath(path)
    if "\\" in real or any("\ud800" <= character <= "\udfff" for character in real):
        raise UserError(
            f"{real!r} holds a backslash or is not UTF-8, so checkpoints cannot be kept there; choose "
            "another --workdir."
        )


def check_stage(
    run: Run, stage: str, config: Mapping[str, Any], inputs: Sequence[str] = ()
) -> None:
    """Raises what `run_stage` would raise, without changing anything; inputs not yet built are ignored.

    Raises:
        UserError: see `run_stage`.
    """
    manifest = run.manifest(stage)
    _refuse_link(run, stage, manifest)
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
    """Builds one stage, or does nothing if it is done and nothing it depends on has changed.

    `fn(run, stage_dir)` writes into `stage_dir` and returns metrics: nested dicts of numbers,
    strings, booleans and lists; NaN and infinity become null. After a kill, `fn` is called again in
    the same folder; it must resume from the files there and end with the same files and metrics.

    Args:
        run: the run; locked while the stage runs.
        stage: name of the stage.
        config: the part of the config that this stage depends on.
        inputs: the stages it reads; each must be done and its files unchanged.
        fn: builds the stage.
        overwrite: rebuild the stage instead of raising because of a change.
        reports_on_others: the metrics are keyed by the stages that they describe, and are merged into theirs.

    Returns:
        The manifest of the finished stage.

    Raises:
        UserError: an input is missing, unfinished or edited; or the stage was built with another config or
            other inputs, or its files were edited, and `overwrite` is false; or its folder is a link and it
            is not done there.
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
                # Merged again because a reused stage has no metrics in this run yet, and because metrics
                # about another stage were deleted if that stage was rebuilt.
                _merge_metrics(run, old.metrics, {stage: costs.summary(run.stage_dir(stage))})
                return old
        _refuse_link(run, stage, run.manifest(stage))
        manifest = StageManifest(stage, "running", config, _fingerprints(run, inputs))
        return _execute(run, manifest, fn, reports_on_others)


def _refuse_link(run: Run, stage: str, manifest: StageManifest | None) -> None:
    """Raises UserError if building the stage would write through a link, into what may be another run."""
    path = run.stage_dir(stage)
    if os.path.islink(path) and (manifest is None or not manifest.is_done):
        raise UserError(
            f"{path} is a link to a stage that is not done; finish it in its own run, or remove the link."
        )


def _execute(
    run: Run, manifest: StageManifest, fn: StageFn, reports_on_others: bool
) -> StageManifest:
    stage_dir = run.stage_dir(manifest.stage)
    is_new = not stage_dir.exists()
    if not is_new:
        _remove_unfinished(stage_dir)
    _write_manifest(stage_dir, manifest)
    try:
        with costs.timed(stage_dir):
            metrics = fn(run, stage_dir)
    except UserError as error:
        # The remedy is often another config, which a half-built stage would refuse, so a new stage is
        # deleted. After a full disk the same config is run again and resumes, so its files are kept.
        if is_new and not isinstance(error.__cause__, OSError):
            _delete(run, manifest.stage)
        raise
    outputs = digests.folder_digests(stage_dir, exclude=_SIDE_FILES)
    metrics = _plain(metrics) if reports_on_others else {manifest.stage: _plain(metrics)}
    manifest = dataclasses.replace(manifest, status="done", outputs=outputs, metrics=metrics)
    manifest = dataclasses.replace(manifest, fingerprint=_fingerprint(manifest))
    # Metrics before the manifest: after a kill in between, the stage runs again and gives the same metrics.
    _merge_metrics(run, metrics, {manifest.stage: costs.summary(stage_dir)})
    _write_manifest(stage_dir, manifest)
    return manifest


def _why_stale(
    run: Run, manifest: StageManifest, config: Mapping[str, Any], inputs: Sequence[str]
) -> str:
    stage, remedy = manifest.stage, "rebuild it with --overwrite or choose another --workdir"
    changed = _first_difference(manifest.config, config)
    if changed:
        return f"Stage {stage!r} was built with another config ({changed}); {remedy}."
    if sorted(manifest.inputs) != sorted(inputs):
        old, new = (", ".join(sorted(names)) or "none" for names in (manifest.inputs, inputs))
        return f"Stage {stage!r} was built from the stages {old}, not {new}; {remedy}."
    for name, fingerprint in manifest.inputs.items():
        current = run.manifest(name)
        if current is not None and current.is_done and current.fingerprint != fingerprint:
            return (
                f"Stage {stage!r} was built from a {name!r} that has since been rebuilt; {remedy}."
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
        current = digests.folder_digests(run.stage_dir(stage), exclude=_SIDE_FILES)
    except UserError as error:
        raise UserError(
            f"Stage {stage!r} was edited after it was done: {error} {remedy.capitalize()}."
        ) from None
    differing = sorted(_own_outputs(current, manifest.outputs).items() ^ manifest.outputs.items())
    if differing:
        name = differing[0][0]
        raise UserError(f"Stage {stage!r} was edited after it was done ({name} differs); {remedy}.")
    if _fingerprint(manifest) != manifest.fingerprint:
        raise UserError(f"Stage {stage!r} has an edited {MANIFEST}; {remedy}.")


def _own_outputs(current: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, str]:
    """The digests of a stage's files without those of versions that were added to a memory later.

    A memory that a stage built is a supported place for more documents: each change is a new folder, and the
    files of earlier versions stay as they are. `CURRENT`, which names the newest version, may differ then.
    """
    own = {name[:7] for name in outputs if _VERSION.match(name)}
    later = {name for name in current if _VERSION.match(name) and own and name[:7] > max(own)}
    kept = {name: digest for name, digest in current.items() if name not in later}
    if later and _CURRENT in kept and _CURRENT in outputs:
        kept[_CURRENT] = outputs[_CURRENT]
    return kept


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


def _merge_metrics(run: Run, metrics: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    merged = _merge(run.metrics, {**metrics, MACHINE: machine})
    files.write_json(run.workdir / "metrics.json", merged)


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`new` merged into `old` two levels deep; deeper values are replaced as a whole."""
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(old.get(key), Mapping)
        merged[key] = {**old[key], **value} if both else value
    return merged


def _delete(run: Run, stage: str) -> None:
    metrics = run.metrics
    if metrics.pop(stage, None) is not None or stage in metrics.get(MACHINE, {}):
        metrics.get(MACHINE, {}).pop(stage, None)
        files.write_json(run.workdir / "metrics.json", metrics)
    # Renamed atomically first, so that a kill never leaves half a stage under its name.
    trash = run.workdir / f"{TRASH}{uuid.uuid4().hex}"
    run.stage_dir(stage).rename(trash)
    files.discard(trash)


def _empty_trash(run: Run) -> None:
    if not run.workdir.exists():  # A remote folder without files.
        return
    for entry in run.workdir.iterdir():
        if entry.name.startswith(TRASH):
            files.discard(entry)


def _remove_unfinished(stage_dir: epath.Path) -> None:
    # The temporary names of files.write_atomic, which uses them only on local disks.
    for folder, _, names in os.walk(stage_dir):
        for name in names:
            if re.fullmatch(r"\..+\.[a-z0-9_]{8}", name):
                os.unlink(os.path.join(folder, name))
