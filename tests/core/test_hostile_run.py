"""Files of a run that were damaged, or written by a stranger: a finished run works, or says one sentence."""

import json

import pytest
from etils import epath

from rag_mm.core import costs, run_folder
from rag_mm.core.errors import UserError

DAMAGE = [
    b"",
    b"[" * 5000,
    b"null",
    b"[]",
    b'{"a": NaN}',
    bytes(64),
    b'{"machine": 3, "words": []}',
]


def words(run, stage_dir):
    (stage_dir / "words.txt").write_text("a b c")
    return {"count": 3}


@pytest.fixture
def run(tmp_path):
    run = run_folder.Run(epath.Path(tmp_path / "run"))
    run_folder.run_stage(run, "words", {"n": 3}, (), words)
    return run


@pytest.mark.parametrize("data", DAMAGE)
def test_damaged_times_and_metrics_stop_no_finished_run(run, data):
    (run.stage_dir("words") / costs.FILE_NAME).write_bytes(data)
    (run.workdir / "metrics.json").write_bytes(data)
    assert isinstance(run.metrics, dict)
    run_folder.run_stage(run, "words", {"n": 3}, (), words)
    assert run.metrics["words"] == {"count": 3}
    assert run.metrics["machine"]["words"]["wall_seconds"] == 0
    run.save_costs("all", ["words"])
    assert run.finished_stage("words") == run.stage_dir("words")


@pytest.mark.parametrize(
    "key", ["inputs", "outputs", "config", "metrics", "stage", "status", "fingerprint"]
)
@pytest.mark.parametrize("value", [None, 3, [], ["a"], "../words", {"a": None}])
def test_any_value_of_a_manifest_is_one_sentence(run, key, value):
    path = run.stage_dir("words") / run_folder.MANIFEST
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {key: value}))
    with pytest.raises(UserError):
        run.finished_stage("words")


@pytest.mark.parametrize("data", DAMAGE[:-1])
def test_any_damage_of_a_manifest_or_config_is_one_sentence(run, data):
    (run.workdir / "config.json").write_bytes(data)
    with pytest.raises(UserError, match=r"config\.json"):
        _ = run.config
    (run.stage_dir("words") / run_folder.MANIFEST).write_bytes(data)
    with pytest.raises(UserError, match=r"manifest\.json"):
        run.finished_stage("words")
