"""`rag-mm train` that is stopped, killed or finds a damaged checkpoint ends as the run left alone does."""

import json
import signal
import time

import killed_train
import numpy as np
import pytest

from rag_mm.core import run_folder

pytestmark = pytest.mark.slow
STAGE, CHECKPOINT_EVERY = "tokenizer", 20


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    killed_train.train(workdir, STAGE)
    return killed_train.outcome(workdir)


def stop_after(workdir, step, how):
    """Starts the command and ends it by a signal once it has logged a step; its exit code."""
    process = killed_train.start(workdir, STAGE)
    log, deadline = workdir / STAGE / "log.jsonl", time.monotonic() + killed_train.TIMEOUT
    while not log.exists() or json.loads(log.read_text().splitlines()[-1])["step"] < step:
        assert process.poll() is None, workdir.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    return process.wait(killed_train.TIMEOUT)


def steps(workdir):
    names = [path.name for path in (workdir / STAGE / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def test_sigterm_between_checkpoints_leaves_the_fingerprint_as_it_is(unbroken, tmp_path):
    workdir, saved = tmp_path / "run", 0
    for after in range(30, 200, 20):  # It may stop just where a checkpoint falls anyway.
        assert stop_after(workdir, after, signal.SIGTERM) == 143
        saved = steps(workdir)[-1]
        if saved % CHECKPOINT_EVERY:
            break
    assert saved % CHECKPOINT_EVERY
    killed_train.train(workdir, STAGE)
    assert killed_train.outcome(workdir) == unbroken


def flip_a_bit(folder):
    """In the largest file of values of a checkpoint."""
    files = [path for path in folder.rglob("d/*") if path.is_file()]
    path = max(files, key=lambda file: file.stat().st_size)
    data, rng = bytearray(path.read_bytes()), np.random.default_rng(0)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def test_a_damaged_checkpoint_does_not_block_its_stage(unbroken, tmp_path):
    workdir = tmp_path / "run"
    assert stop_after(workdir, 70, signal.SIGKILL) == -signal.SIGKILL
    before, newest = steps(workdir)[-2:]
    flip_a_bit(workdir / STAGE / "checkpoints" / str(newest))
    killed_train.train(workdir, STAGE)
    said = workdir.with_suffix(".log").read_text()
    assert f"checkpoint {newest} is damaged" in said and f"resuming from {before}" in said
    assert killed_train.outcome(workdir) == unbroken
    # What a later stage does with its inputs.
    run_folder.open_run(workdir).finished_stage(STAGE)
    killed_train.train(workdir, STAGE)
    assert "already done" in workdir.with_suffix(".log").read_text()


def test_killed_in_every_phase_it_gives_the_same_bits(tmp_path):
    """One kill in each; the script does forty."""
    found = killed_train.compare(tmp_path / "runs", num_kills=8)
    assert set(found["kills"].values()) == {1}
    assert found["same"] and all(found["same"].values())
