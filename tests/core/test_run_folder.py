"""A run is a folder of stages: built once, resumed after a kill, and refused if their inputs changed."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import fresh_python
import numpy as np
import pytest
from etils import epath

from rag_mm.core import costs, files, run_folder
from rag_mm.core.errors import UserError

PROGRAMS = pathlib.Path(__file__).parent / "programs"


@pytest.fixture
def run(tmp_path):
    return run_folder.Run(epath.Path(tmp_path / "run"))


class Calls(list):
    """Stage functions that count how often they are called."""

    def words(self, run, stage_dir):
        self.append("words")
        (stage_dir / "words.txt").write_text("a b c")
        return {"count": np.int64(3), "share": {"seen": 0.5}}

    def model(self, run, stage_dir):
        self.append("model")
        text = (run.stage_dir("words") / "words.txt").read_text()
        (stage_dir / "sub").mkdir(exist_ok=True)
        (stage_dir / "sub" / "model.bin").write_bytes(text.upper().encode())
        return {"loss": float("nan"), "rates": np.float32([0.5, 0.25])}


def _chain(run, calls, words=None, model=None, overwrite=False):
    run_folder.run_stage(run, "words", words or {"n": 3}, (), calls.words, overwrite)
    return run_folder.run_stage(
        run, "model", model or {"dim": 8}, ("words",), calls.model, overwrite
    )


def test_a_done_stage_is_not_rebuilt(run):
    calls = Calls()
    first = _chain(run, calls)
    assert _chain(run, calls) == first and calls == ["words", "model"]
    assert first.is_done and set(first.outputs) == {"sub/model.bin"}
    assert first.inputs == {"words": run.manifest("words").fingerprint}


def test_two_runs_from_scratch_are_bitwise_identical(run, tmp_path):
    """Manifests are equal as files, metrics except for the key "machine"."""
    other = run_folder.Run(epath.Path(tmp_path / "other"))
    for each in (run, other):
        _chain(each, Calls())
    for stage in ("words", "model"):
        paths = [each.stage_dir(stage) / "manifest.json" for each in (run, other)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
    metrics = [{**each.metrics, "machine": None} for each in (run, other)]
    assert metrics[0] == metrics[1]


def test_metrics_are_nested_by_stage_in_plain_json(run):
    _chain(run, Calls())
    metrics = run.metrics
    assert metrics["words"] == {"count": 3, "share": {"seen": 0.5}}
    assert metrics["model"] == {"loss": None, "rates": [0.5, 0.25]}
    cost = metrics["machine"]["model"]
    assert cost["wall_seconds"] >= 0 and cost["peak_rss_mb"] > 10 and cost["machine"]["cores"] >= 1


def test_a_changed_config_is_refused_by_name_and_rebuilt_with_overwrite(run):
    calls = Calls()
    before = _chain(run, calls)
    with pytest.raises(
        UserError, match=r"'model' was built with another config \(dim was 8, now 16\)"
    ):
        _chain(run, calls, model={"dim": 16})
    assert run.manifest("model") == before
    after = _chain(run, calls, model={"dim": 16}, overwrite=True)
    assert calls == ["words", "model", "model"] and after.fingerprint != before.fingerprint
    assert sorted(p.name for p in run.workdir.iterdir()) == [
        ".lock",
        "metrics.json",
        "model",
        "words",
    ]


def test_a_rebuilt_input_makes_the_stage_above_stale(run):
    calls = Calls()
    _chain(run, calls)
    run_folder.run_stage(run, "words", {"n": 4}, (), calls.words, overwrite=True)
    with pytest.raises(
        UserError, match="'model' was built from a 'words' that has since been rebuilt"
    ):
        run_folder.run_stage(run, "model", {"dim": 8}, ("words",), calls.model)
    _chain(run, calls, words={"n": 4}, overwrite=True)
    assert calls == ["words", "model", "words", "model"]


def test_overwrite_does_not_rebuild_up_to_date_stages(run):
    calls = Calls()
    _chain(run, calls)
    _chain(run, calls, overwrite=True)
    assert calls == ["words", "model"]


@pytest.mark.parametrize("edit", ["change", "add", "remove", "manifest"])
def test_an_edited_input_is_refused_by_name(run, edit):
    calls = Calls()
    _chain(run, calls)
    folder = pathlib.Path(run.stage_dir("words"))
    if edit == "change":
        (folder / "words.txt").write_text("a b d")
    elif edit == "add":
        (folder / "more.txt").write_text("d")
    elif edit == "remove":
        (folder / "words.txt").unlink()
    else:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": "0" * 64}))
    for ask in (
        lambda: run_folder.run_stage(
            run, "model", {"dim": 9}, ("words",), calls.model, overwrite=True
        ),
        lambda: run.finished_stage("words"),
        lambda: run_folder.check_stage(run, "words", {"n": 3}),
        lambda: _chain(run, calls),
    ):
        with pytest.raises(UserError, match=r"'words' (was edited after|has an edited manifest)"):
            ask()
    assert calls == ["words", "model"]
    _chain(run, calls, overwrite=True)
    assert calls == ["words", "model", "words"], (
        "the rebuilt stage is identical, so the stage that depends on it stays valid"
    )


def test_inputs_must_be_done(run):
    with pytest.raises(UserError, match="no stage 'words'"):
        run_folder.run_stage(run, "model", {}, ("words",), Calls().model)
    assert not run.stage_dir("model").exists()


def test_other_inputs_are_refused(run):
    calls = Calls()
    _chain(run, calls)
    with pytest.raises(UserError, match="'model' was built from the stages words, not none"):
        run_folder.run_stage(run, "model", {"dim": 8}, (), calls.model)


def test_checking_touches_nothing(run):
    run_folder.check_stage(run, "model", {"dim": 8}, ("words",))
    assert not run.workdir.exists()
    _chain(run, Calls())
    run_folder.check_stage(run, "model", {"dim": 8}, ("words",))
    with pytest.raises(UserError, match="dim was 8, now absent"):
        run_folder.check_stage(run, "model", {}, ("words",))


def test_a_user_error_inside_a_stage_leaves_no_stage(run):
    def fail(run, stage_dir):
        (stage_dir / "half").write_text("half")
        raise UserError("No.")

    with pytest.raises(UserError, match="No"):
        run_folder.run_stage(run, "words", {}, (), fail)
    assert not run.stage_dir("words").exists()


def test_a_full_disk_keeps_the_files_of_a_stage(run):
    """The same command, run again, resumes from them."""

    def fill(run, stage_dir):
        (stage_dir / "half").write_text("made")
        raise UserError("The disk is full.") from OSError(28, "No space left on device")

    with pytest.raises(UserError, match="full"):
        run_folder.run_stage(run, "words", {"n": 3}, (), fill)
    assert (run.stage_dir("words") / "half").exists()


def test_a_failed_stage_resumes_in_its_folder(run):
    """The second call finds the files of the first, except those of unfinished atomic writes."""
    seen = []

    def crash_once(run, stage_dir):
        seen.append(sorted(path.name for path in stage_dir.iterdir()))
        (stage_dir / "part").write_text("1")
        (stage_dir / ".part.ab12cd34").write_text("unfinished")
        if len(seen) == 1:
            raise FloatingPointError
        return {}

    with pytest.raises(FloatingPointError):
        run_folder.run_stage(run, "words", {"n": 1}, (), crash_once)
    assert run.manifest("words").status == "running"
    with pytest.raises(UserError, match="an unfinished stage 'words'"):
        run.finished_stage("words")
    with pytest.raises(UserError, match="another config"):
        run_folder.run_stage(run, "words", {"n": 2}, (), crash_once)
    run_folder.run_stage(run, "words", {"n": 1}, (), crash_once)
    assert seen == [["manifest.json", "times.json"], ["manifest.json", "part", "times.json"]]
    assert costs.summary(run.stage_dir("words"))["parts"] == 2


def _stage(workdir, kill_at):
    return fresh_python.run(PROGRAMS / "killed_stage.py", workdir, kill_at)


def test_a_killed_and_rerun_stage_equals_an_uninterrupted_one(tmp_path):
    """SIGKILL releases the lock; the killed part's seconds are counted up to its last update."""
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    assert _stage(broken, kill_at=2).returncode == -signal.SIGKILL
    assert _stage(broken, kill_at=0).returncode == 0
    assert _stage(whole, kill_at=0).returncode == 0
    manifests = [(folder / "count/manifest.json").read_bytes() for folder in (broken, whole)]
    assert manifests[0] == manifests[1]
    metrics = [run_folder.Run(epath.Path(folder)).metrics for folder in (broken, whole)]
    assert metrics[0]["count"] == metrics[1]["count"] == {"steps": 3}
    cost = metrics[0]["machine"]["count"]
    assert cost["parts"] == 2 and cost["wall_seconds"] >= 0.2


def test_one_process_at_a_time(run):
    command = [sys.executable, str(PROGRAMS / "hold_run_lock.py"), str(run.workdir)]
    process = subprocess.Popen(
        command, env=fresh_python.environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="in use by another process"):
            _chain(run, Calls())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with run.locked():
        _chain(run, Calls())


def test_the_times_file_is_updated_while_a_stage_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "_UPDATE_SECONDS", 0.01)
    folder = epath.Path(tmp_path)
    with costs.timed(folder):
        deadline = time.monotonic() + 10
        while costs.read(folder)["parts"][0]["wall_seconds"] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert costs.read(folder)["parts"][0]["wall_seconds"] > 0
    assert len(costs.read(folder)["parts"]) == 1


def test_opening_a_folder_that_is_not_a_run(tmp_path):
    with pytest.raises(UserError, match="is not a run"):
        run_folder.open_run(tmp_path)
    run_folder.Run(epath.Path(tmp_path)).save_config({"seed": 0})
    assert run_folder.open_run(tmp_path).config == {"seed": 0}


def test_an_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        _chain(run_folder.Run(epath.Path(tmp_path / "file" / "run")), Calls())


@pytest.mark.parametrize("name", ["machine", "../x", "A", ""])
def test_stage_names(run, name):
    with pytest.raises(ValueError, match="lower-case"):
        run.stage_dir(name)


def test_trash_of_a_killed_deletion_is_emptied(run):
    _chain(run, Calls())
    trash = pathlib.Path(run.workdir) / ".deleted-0"
    os.makedirs(trash / "sub")
    _chain(run, Calls())
    assert not trash.exists()


def test_an_edited_manifest_of_another_shape(run):
    _chain(run, Calls())
    files.write_json(run.stage_dir("words") / "manifest.json", {"status": "done"})
    with pytest.raises(UserError, match="not a valid stage manifest; delete"):
        run.finished_stage("words")


def test_a_stage_that_is_a_link_is_rebuilt_beside_what_it_names(run, tmp_path):
    calls = Calls()
    _chain(run, calls)
    moved = tmp_path / "moved"
    run.stage_dir("model").rename(moved)
    pathlib.Path(run.stage_dir("model")).symlink_to(moved)
    _chain(run, calls)
    assert calls == ["words", "model"]
    for dim in (16, 24):
        _chain(run, calls, model={"dim": dim}, overwrite=True)
    assert calls == ["words", "model"] + ["model"] * 2
    assert (moved / "sub" / "model.bin").read_text() == "A B C"
    assert not pathlib.Path(run.stage_dir("model")).is_symlink()


@pytest.mark.parametrize("is_there", [True, False], ids=["unfinished", "nowhere"])
def test_an_unfinished_stage_that_is_a_link_is_not_written_through(run, tmp_path, is_there):
    """What it names may belong to another run."""
    calls, moved = Calls(), tmp_path / "moved"
    _chain(run, calls)
    run.stage_dir("model").rename(moved)
    if is_there:
        manifest = files.read_json(moved / "manifest.json") | {"status": "running"}
        files.write_json(moved / "manifest.json", manifest)
        before = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    pathlib.Path(run.stage_dir("model")).symlink_to(moved if is_there else tmp_path / "nowhere")
    for refused in (
        lambda: _chain(run, calls),
        lambda: _chain(run, calls, overwrite=True),
        lambda: run_folder.check_stage(run, "model", {"dim": 8}, ("words",)),
    ):
        with pytest.raises(UserError, match="model is a link to a stage that is not done"):
            refused()
    assert calls == ["words", "model"] and not (tmp_path / "nowhere").exists()
    if is_there:
        assert before == {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_an_earlier_rebuild_left_blocks_no_command(run, tmp_path, kind):
    _chain(run, Calls())
    victim, trash = tmp_path / "victim", pathlib.Path(run.workdir) / ".deleted-0"
    victim.mkdir()
    if kind == "link":
        trash.symlink_to(victim)
    else:
        trash.write_text("")
    _chain(run, Calls())
    assert not os.path.lexists(trash) and victim.is_dir()


def test_a_lock_that_is_a_link_empties_nothing(run, tmp_path):
    _chain(run, Calls())
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (pathlib.Path(run.workdir) / ".lock").unlink()
    (pathlib.Path(run.workdir) / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match=r"\.lock is a link; remove it"):
        _chain(run, Calls())
    assert victim.read_text() == "precious"


def _memory(run, stage_dir):
    """The files of a memory of two versions."""
    for version in ("v000001", "v000002"):
        (stage_dir / version).mkdir()
        (stage_dir / version / "manifest.json").write_text(version)
    (stage_dir / "CURRENT").write_text("v000002 digest")
    return {}


def _add_version(folder):
    (folder / "v000003").mkdir()
    (folder / "v000003" / "ids.json").write_text("[]")
    (folder / "CURRENT").write_text("v000003 digest")


def test_versions_added_to_a_stages_memory_leave_it_finished(run):
    calls = Calls()
    run_folder.run_stage(run, "memory", {}, (), _memory)
    _add_version(run.stage_dir("memory"))
    assert run.finished_stage("memory") == run.stage_dir("memory")
    run_folder.run_stage(run, "words", {"n": 3}, ("memory",), calls.words)
    assert calls == ["words"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda folder: (folder / "v000002" / "manifest.json").write_text("other"),
        lambda folder: (folder / "v000001" / "more.json").write_text("{}"),
        lambda folder: (folder / "v000001" / "manifest.json").unlink(),
        lambda folder: (folder / "CURRENT").unlink(),
        lambda folder: (folder / "notes.txt").write_text("x"),
    ],
    ids=["changed", "added", "removed", "no pointer", "beside"],
)
def test_its_own_files_stay_protected_beside_a_later_version(run, edit):
    run_folder.run_stage(run, "memory", {}, (), _memory)
    _add_version(run.stage_dir("memory"))
    edit(run.stage_dir("memory"))
    with pytest.raises(UserError, match="'memory' was edited after it was done"):
        run.finished_stage("memory")


def test_the_pointer_is_protected_without_a_later_version(run):
    run_folder.run_stage(run, "memory", {}, (), _memory)
    (run.stage_dir("memory") / "CURRENT").write_text("v000001 digest")
    with pytest.raises(UserError, match="CURRENT differs"):
        run.finished_stage("memory")


@pytest.mark.parametrize("name", ["back\\slash", "not utf-8 \udcff"])
def test_a_folder_whose_arrays_would_go_astray_is_refused(tmp_path, name):
    """TensorStore reads a backslash as the end of a folder's name, and takes no path that is not UTF-8."""
    (tmp_path / "link").symlink_to(tmp_path / name)
    for path in (tmp_path / name, tmp_path / "link"):
        with pytest.raises(UserError, match="choose another --workdir"):
            _chain(run_folder.Run(epath.Path(path)), Calls())
        with pytest.raises(UserError, match="choose another --workdir"):
            run_folder.open_run(path)
    assert os.listdir(tmp_path) == ["link"]
