"""`rag-mm train` as several processes: the run of one, whoever resumes it, and one end for all."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from rag_mm.core import files

PAGE = pathlib.Path(__file__).with_name("small_page.py")
NUM_DEVICES = 8
TIMEOUT = 1800
TRAINED = ("tokenizer", "retriever", "decoder", "control")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(workdir, count, preset, *words, meets_by="address"):
    """The processes of one run, on eight simulated devices in all.

    They meet by an address that they are given, or by what Slurm would tell them.
    """
    program = [str(pathlib.Path(sys.executable).with_name("rag-mm")), "train"]
    shared = [*program, f"--config={PAGE}:{preset}", f"--workdir={workdir}", *words]
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={NUM_DEVICES // count}",
    }
    port, running = free_port(), []
    for me in range(count):
        meeting, own = [], {}
        if meets_by == "slurm":
            own = {
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": str(count),
                "SLURM_PROCID": str(me),
                "SLURM_LOCALID": str(me),
                "JAX_COORDINATOR_PORT": str(port),
            }
            meeting = ["--coordinator=auto"]
        elif count > 1:
            meeting = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}"]
            meeting.append(f"--process-id={me}")
        log = workdir.with_name(f"{workdir.name}-{me}.log").open("w")
        running.append(subprocess.Popen([*shared, *meeting], env=env | own, stdout=log, stderr=log))
    return running


def said(workdir, me):
    return workdir.with_name(f"{workdir.name}-{me}.log").read_text()


def train(workdir, count, preset, *words, **options):
    """To the end of all."""
    running = start(workdir, count, preset, *words, **options)
    try:
        for me, process in enumerate(running):
            assert process.wait(timeout=TIMEOUT) == 0, said(workdir, me)[-4000:]
    finally:
        for process in running:
            process.kill()
    return workdir


def rows(workdir, stage):
    lines = (workdir / stage / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_losses(workdir, other, stage, rtol):
    ours, theirs = rows(workdir, stage), rows(other, stage)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for name in ("loss", "grad_norm"):
        found, wanted = ([row[name] for row in each] for each in (ours, theirs))
        np.testing.assert_allclose(found, wanted, rtol=rtol, atol=2e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone") / "run", 1, "all")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return train(tmp_path_factory.mktemp("pair") / "run", 2, "all")


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(alone, pair):
    for stage in TRAINED:
        assert_same_losses(pair, alone, stage, rtol=1e-4)
    found, wanted = (files.read_array(run / "neighbors" / "train.npy") for run in (pair, alone))
    assert (found == wanted).mean() > 0.99  # A score in a near tie may fall on either side.


@pytest.mark.slow
def test_the_first_process_writes_what_one_does_and_the_others_are_quiet(alone, pair):
    folders = {run: {path.name for path in run.iterdir()} for run in (alone, pair)}
    assert folders[alone] == folders[pair]
    for stage in TRAINED:
        manifests = [files.read_json(run / stage / "manifest.json") for run in (alone, pair)]
        assert [manifest["status"] for manifest in manifests] == ["done", "done"]
        assert manifests[0]["config"] == manifests[1]["config"]
        assert len(files.read_json(pair / stage / "times.json")["parts"]) == 1
    assert "decoder: starting" in said(pair, 0) and "decoder" not in said(pair, 1)


@pytest.mark.slow
def test_a_finished_run_of_two_is_a_finished_run_of_one(pair):
    before = files.read_json(pair / "decoder" / "manifest.json")
    train(pair, 1, "all")
    assert "decoder: already done" in said(pair, 0)
    assert files.read_json(pair / "decoder" / "manifest.json") == before


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 1), (1, 2)], ids=["two, then one", "one, then two"])
def test_another_count_goes_on_where_a_run_was_told_to_end(tmp_path, counts):
    """The order of the data is the run's: losses are those of a run that was never ended."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    first, then = counts
    running = start(folder, first, "long", meets_by="slurm" if first > 1 else "address")
    wait_for_a_checkpoint(folder, running)
    running[-1].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=240) for process in running] == [143] * first
    assert rows(folder, "tokenizer")[-1]["step"] < 60
    train(folder, then, "long", meets_by="slurm" if then > 1 else "address")
    train(whole, 1, "long")
    assert_same_losses(folder, whole, "tokenizer", rtol=1e-2)


def wait_for_a_checkpoint(workdir, running):
    deadline = time.monotonic() + TIMEOUT
    folder = workdir / "tokenizer" / "checkpoints"
    while not any(path.name.isdigit() for path in folder.glob("*")):
        for me, process in enumerate(running):
            assert process.poll() is None, said(workdir, me)[-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_within_a_minute(tmp_path, victim):
    running = start(tmp_path / "run", 2, "long")
    wait_for_a_checkpoint(tmp_path / "run", running)
    running[victim].kill()
    began = time.monotonic()
    assert running[1 - victim].wait(timeout=120) not in (0, None)
    assert time.monotonic() - began < 60
    running[victim].wait()


@pytest.mark.slow
def test_what_the_first_refuses_ends_all(tmp_path):
    """A run built with another config, which only process 0 checks."""
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    manifest = dict(stage="tokenizer", status="running", config={"seed": 1}, inputs={})
    files.write_json(tmp_path / "run" / "tokenizer" / "manifest.json", manifest)
    running = start(tmp_path / "run", 2, "tokenizer")
    assert [process.wait(timeout=240) for process in running] == [2, 2]
    for me in range(2):
        assert "was built with another config" in said(tmp_path / "run", me)
        assert "Traceback" not in said(tmp_path / "run", me)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_processes_that_were_asked_for_different_things_are_refused(tmp_path):
    port = free_port()
    running = []
    for me in range(2):
        words = [f"--coordinator=127.0.0.1:{port}", "--num-processes=2", f"--process-id={me}"]
        # `start` with a count of one adds no address of its own.
        running += start(tmp_path / f"run{me}", 1, "tokenizer", f"--config.seed={me}", *words)
    assert [process.wait(timeout=240) for process in running] == [2, 2]
    assert "Process 1 was started with another config" in said(tmp_path / "run1", 0)
