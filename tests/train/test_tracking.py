"""Log lines go to an experiment tracker, which can neither change nor stop the training."""

import json
import pathlib
import sys
import types

import jax
import pytest
import test_loop
from etils import epath

from rag_mm.cli import main
from rag_mm.core import costs, progress, run_folder
from rag_mm.core.errors import UserError
from rag_mm.stages import chain
from rag_mm.train import tracking


class Fake(types.ModuleType):
    """A tracker that keeps what it is told."""

    def __init__(self, name="fake", fails=()):
        super().__init__(name)
        self.begun, self.rows, self.num_ended, self._fails = [], [], 0, fails

    def init(self, project, name=None, config=None, resume="never"):
        self._may_fail("init")
        self.begun.append({"project": project, "name": name, "config": config, "resume": resume})

    def log(self, values, step=None):
        self._may_fail("log")
        self.rows.append((step, values))

    def finish(self):
        self._may_fail("finish")
        self.num_ended += 1

    def _may_fail(self, what):
        if what in self._fails:
            raise OSError("no network")


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(progress, "warn", said.append)
    return said


def fit(folder, tracker, **options):
    with tracking.tracked(tracking.Destination(tracker, {"seed": 3})):
        return test_loop.fit(folder / "run" / "decoder", **options)


def test_a_stage_is_a_run_with_its_log_lines(tmp_path):
    tracker = Fake()
    _, rows, _ = fit(tmp_path, tracker)
    (begun,) = tracker.begun
    assert (begun["project"], begun["resume"]) == ("rag_mm", "allow")
    assert begun["name"].startswith("run-decoder-")
    assert begun["config"] == {"seed": 3, "stage": "decoder"}
    sent = [{"step": step, "loss": values["train/loss"]} for step, values in tracker.rows]
    assert sent == [
        {"step": row["step"], "loss": pytest.approx(row["loss"], abs=1e-6)} for row in rows
    ]
    assert all(values["speed/step_seconds_p50"] > 0 for _, values in tracker.rows)
    assert tracker.num_ended == 1


def test_an_interrupted_stage_goes_on_with_its_run_and_repeats_no_step(tmp_path):
    tracker = Fake()
    with pytest.raises(test_loop.Killed):
        fit(tmp_path, tracker, iterator=test_loop.dying(at=7))
    # Its newest checkpoint is that of step 4, so that steps 5 and 6 are taken again.
    assert [step for step, _ in tracker.rows] == [2, 4, 6]
    fit(tmp_path, tracker)
    assert [step for step, _ in tracker.rows] == [2, 4, 6, 8]
    first, second = tracker.begun
    assert first == second and tracker.num_ended == 2


def test_an_id_is_passed_to_a_tracker_that_takes_one(tmp_path):
    class WithId(Fake):
        def init(self, project, name=None, config=None, id=None, resume=None):
            self.begun.append((id, resume))

    tracker = WithId()
    fit(tmp_path, tracker)
    saved = json.loads((tmp_path / "run" / "decoder" / costs.TRACKER_NAME).read_text())
    assert tracker.begun == [(saved["id"], "allow")] and saved["step"] == 8
    other = Fake("other")
    fit(tmp_path, other)
    assert saved["id"][:8] not in other.begun[0]["name"]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_failing_tracker_is_one_warning(tmp_path, warnings, failing):
    tracker = Fake(fails=(failing,))
    state, _, _ = fit(tmp_path, tracker)
    assert state.step == 8
    (warning,) = warnings
    assert warning == "fake failed (OSError: no network); training goes on without it."


def test_only_the_leader_sends(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    folder, tracker = tmp_path / "decoder", Fake()
    folder.mkdir()
    with tracking.tracked(tracking.Destination(tracker, {})):
        sender = tracking.Tracker(folder)
        sender.write(2, {"train/loss": 1.0})
        sender.close()
    assert not tracker.begun and not tracker.rows and not list(folder.iterdir())


def test_an_absent_tracker_is_one_sentence():
    with pytest.raises(UserError, match="run pip install no_such_tracker, or leave it out"):
        tracking.find("no_such_tracker")


PAGE = pathlib.Path(__file__).parent.parent / "end_to_end" / "small_toy_page.py"


def test_the_command_sends_to_the_tracker_it_names(tmp_path, monkeypatch, capsys):
    tracker = Fake("trackio")
    monkeypatch.setitem(sys.modules, "trackio", tracker)

    def run_chain(config, workdir, **options):
        test_loop.fit(pathlib.Path(workdir) / "fusion")
        return types.SimpleNamespace(metrics={})

    monkeypatch.setattr(chain, "run_chain", run_chain)
    words = ["train", f"--config={PAGE}", f"--workdir={tmp_path / 'run'}", "--tracker=trackio"]
    assert main.main(words) == 0
    (begun,) = tracker.begun
    assert begun["name"].startswith("run-fusion-") and begun["config"]["seed"] == 0
    assert [step for step, _ in tracker.rows] == [2, 4, 6, 8] and tracker.num_ended == 1
    assert main.main([word for word in words if "tracker" not in word]) == 0
    assert len(tracker.begun) == 1


def test_what_is_kept_of_a_tracker_is_no_output_of_the_stage(tmp_path):
    """Its id differs between two runs that are the same bit for bit."""
    run = run_folder.Run(epath.Path(tmp_path / "run"))

    def work(run, stage_dir):
        with tracking.tracked(tracking.Destination(Fake(), {})):
            sender = tracking.Tracker(stage_dir)
            sender.write(1, {"train/loss": 1.0})
            sender.close()
        return {}

    run_folder.run_stage(run, "decoder", {}, (), work)
    path = run.finished_stage("decoder") / costs.TRACKER_NAME
    path.write_text("{}")
    run.finished_stage("decoder")


def test_the_command_refuses_a_tracker_that_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code = main.main(
        ["train", f"--config={PAGE}", f"--workdir={tmp_path / 'run'}", "--tracker=wandb"]
    )
    message = capsys.readouterr().err
    assert code == 2 and "run pip install wandb, or leave it out" in message
    assert not (tmp_path / "run").exists()
