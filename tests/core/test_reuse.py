"""A finished stage is reused from another run if and only if building it here gives the same result."""

import pytest
from etils import epath

from rag_mm.core import costs, files, reuse, run_folder


def words(run, stage_dir):
    (stage_dir / "words.txt").write_text("a b c")
    return {"count": 3}


def model(run, stage_dir):
    text = (run.stage_dir("words") / "words.txt").read_text()
    (stage_dir / "sub").mkdir(exist_ok=True)
    (stage_dir / "sub" / "model.bin").write_bytes(text.upper().encode())
    return {"words": {"loss": 0.5}, "own": {"loss": 0.25}}


def no_work(run, stage_dir):
    pytest.fail("the stage was reused, not built")


def make(run, dim=8):
    run_folder.run_stage(run, "words", {"n": (3, 4)}, (), words)
    return run_folder.run_stage(
        run, "model", {"dim": dim}, ("words",), model, reports_on_others=True
    )


def take_words(run, source, n=(3, 4)):
    return reuse.reuse_stage(run, "words", {"n": n}, (), source)


def take_model(run, source, dim=8):
    return reuse.reuse_stage(run, "model", {"dim": dim}, ("words",), source)


@pytest.fixture
def source(tmp_path):
    run = run_folder.Run(epath.Path(tmp_path / "source"))
    make(run)
    return run


@pytest.fixture
def run(tmp_path):
    return run_folder.Run(epath.Path(tmp_path / "run"))


def test_a_reused_stage_equals_a_computed_one(run, source):
    """The same manifests, files and metrics, and nothing else in the folder."""
    assert take_words(run, source) and take_model(run, source)
    run_folder.run_stage(run, "words", {"n": (3, 4)}, (), no_work)
    run_folder.run_stage(run, "model", {"dim": 8}, ("words",), no_work, reports_on_others=True)
    for stage in ("words", "model"):
        assert run.manifest(stage) == source.manifest(stage)
    assert {**run.metrics, "machine": None} == {**source.metrics, "machine": None}
    assert (run.finished_stage("model") / "sub" / "model.bin").read_bytes() == b"A B C"
    names = sorted(path.name for path in run.workdir.iterdir())
    assert names == [".lock", "metrics.json", "model", "words"]


def spend(run, stage, seconds):
    """Records the given wall time for the stage."""
    part = {"wall_seconds": seconds, "peak_rss_mb": 1024, "code": "", "machine": {}}
    files.write_json(run.stage_dir(stage) / costs.FILE_NAME, {"parts": [part]})


def test_costs_are_copied_and_marked_as_borrowed(run, source):
    """A total includes them, and reports the borrowed share."""
    spend(source, "words", 60.0)
    take_words(run, source)
    run_folder.run_stage(run, "words", {"n": (3, 4)}, (), no_work)
    run_folder.run_stage(run, "model", {"dim": 9}, ("words",), model, reports_on_others=True)
    spend(run, "model", 20.0)
    machine = run.metrics["machine"]
    assert machine["words"]["wall_seconds"] == machine["words"]["borrowed_seconds"] == 60.0
    assert machine["model"]["borrowed_seconds"] == 0
    run.save_costs("whole", ["words", "model"])
    whole = {"wall_seconds": 80.0, "borrowed_seconds": 60.0, "peak_rss_gib": 1.0}
    assert run.metrics["whole"] == whole
    source.save_costs("whole", ["words"])
    assert source.metrics["whole"] == whole | {"wall_seconds": 60.0, "borrowed_seconds": 0.0}


def test_a_reused_stage_can_be_reused_again(run, source, tmp_path):
    """Its costs are still those of the first run."""
    spend(source, "words", 60.0)
    third = run_folder.Run(epath.Path(tmp_path / "third"))
    assert take_words(run, source) and take_words(third, run)
    assert costs.summary(third.stage_dir("words"))["borrowed_seconds"] == 60.0


def test_a_stage_with_another_config_or_inputs_is_not_reused(run, source):
    assert not take_words(run, source, n=(3, 5))
    assert not take_model(run, source)  # its input is not there yet
    run_folder.run_stage(run, "words", {"n": (5,)}, (), words)
    assert not take_model(run, source)
    assert not run.stage_dir("model").exists()


def test_a_stage_already_started_is_not_replaced(run, source):
    def crash(run, stage_dir):
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        run_folder.run_stage(run, "words", {"n": (3, 4)}, (), crash)
    assert not take_words(run, source)
    assert run.manifest("words").status == "running"


@pytest.mark.parametrize("spoil", ["edit", "unfinished", "absent"])
def test_an_edited_or_unfinished_stage_is_not_reused(run, source, spoil):
    folder = source.stage_dir("words")
    if spoil == "edit":
        (folder / "words.txt").write_text("a b d")
    elif spoil == "unfinished":
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"done"', '"running"'))
    else:
        folder.rmtree()
    assert not take_words(run, source)
    assert not run.stage_dir("words").exists()


def test_a_kill_while_copying_leaves_no_stage_and_no_files(run, source, monkeypatch):
    def die(stage_dir):
        raise KeyboardInterrupt

    monkeypatch.setattr(costs, "mark_reused", die)
    with pytest.raises(KeyboardInterrupt):
        take_words(run, source)
    assert not run.stage_dir("words").exists() and len(list(run.workdir.iterdir())) == 2
    run_folder.run_stage(run, "words", {"n": (3, 4)}, (), words)
    names = sorted(path.name for path in run.workdir.iterdir())
    assert names == [".lock", "metrics.json", "words"]
