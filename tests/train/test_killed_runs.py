"""After SIGKILL or a full disk, saved checkpoints survive and a resumed run equals an uninterrupted one."""

import json
import os
import pathlib
import subprocess
import sys
import time

import killed_runs
import numpy as np
import pytest
import test_checkpoint
import test_loop

import rag_mm
from rag_mm.core.errors import UserError
from rag_mm.train import checkpoint

SCRIPT = pathlib.Path(killed_runs.__file__)
ROOT = pathlib.Path(rag_mm.__file__).parents[1]


def start(*arguments, **options):
    path = os.pathsep.join([str(ROOT), str(SCRIPT.parent)])
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def result(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    return result(start("points", tmp_path_factory.mktemp("killed")))


@pytest.mark.parametrize("point", killed_runs.POINTS)
def test_a_run_killed_at_a_named_point_and_restarted_is_bitwise_identical(killed, point):
    assert killed["endings"][point] == 9
    assert killed["saved"][point] == killed_runs.POINTS[point][-1]
    assert_continues(killed["results"][point], killed["results"]["unbroken"])


def assert_continues(again, unbroken):
    """Losses, parameters and batches equal those of the uninterrupted run."""
    assert again["log"] == unbroken["log"] and again["state"] == unbroken["state"]
    assert again["order"].items() <= unbroken["order"].items()
    assert again["order"], "the run was not killed before its end"


@pytest.fixture(scope="module")
def step_fn():
    return test_loop.begin()["step_fn"]


@pytest.fixture(scope="module")
def long_run(step_fn, tmp_path_factory):
    return killed_runs.run(tmp_path_factory.mktemp("long"), killed_runs.LONG, step_fn)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_instant(long_run, step_fn, tmp_path, seed):
    """After the first log line; sometimes before any checkpoint, sometimes after the run has ended."""
    process = start("run", tmp_path)
    wait_for(tmp_path / "log.jsonl", process)
    time.sleep(np.random.default_rng(seed).uniform(0.0, 1.5))
    process.kill()
    process.communicate()
    again = killed_runs.run(tmp_path, killed_runs.LONG, step_fn)
    assert again["log"] == long_run["log"] and again["state"] == long_run["state"]
    assert again["order"].items() <= long_run["order"].items()


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 3 MB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(small_disk, capfd):
    small, batches = test_checkpoint.make_state(), test_checkpoint.make_batches()
    large = test_checkpoint.make_state(width=400_000)
    checkpoints = checkpoint.Checkpoints(small_disk / "checkpoints", keep=2)
    checkpoints.save(test_checkpoint.at_step(small, 2), batches)
    checkpoints.save(test_checkpoint.at_step(large, 4), batches)
    with pytest.raises(UserError, match=r"the disk is full\); the one of step 2 is kept"):
        checkpoints.wait()
    checkpoints.close()
    assert "Traceback" not in capfd.readouterr().err
    again = checkpoint.Checkpoints(small_disk / "checkpoints", keep=2)
    assert int(again.restore(small, batches).step) == 2
    again.close()
