"""SIGTERM in real processes: finished steps are saved, exit code 143, and resuming is bitwise identical."""

import pathlib
import signal
import subprocess
import sys
import time

import fresh_python
import pytest

HERE = pathlib.Path(__file__).parent
PROGRAM = HERE / "programs" / "fit_and_wait.py"


def start(folder, phase, at=3):
    folder.mkdir(exist_ok=True)
    environment = fresh_python.environment(HERE)
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), phase, str(at)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=folder,
    )


def end(process, folder):
    """Sends SIGTERM once the process reaches its phase. Returns exit code and seconds."""
    deadline = time.monotonic() + 120
    while not (folder / "here").exists():
        assert process.poll() is None, process.stderr.read()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=60), time.monotonic() - began


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    process = start(folder, "never")
    assert process.wait(timeout=180) == 0, process.stderr.read()[-2000:]
    return (folder / "kernel.npy").read_bytes(), (folder / "run" / "log.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "saved"), [("step", "3"), ("eval", "4"), ("save", "4"), ("compile", None)]
)
def test_a_run_that_receives_sigterm_loses_no_step(unbroken, tmp_path, phase, saved):
    """The third step is between two log lines: its partial sums are saved too."""
    process = start(tmp_path, phase)
    code, seconds = end(process, tmp_path)
    assert code == 143, process.stderr.read()[-2000:]
    assert seconds < (5 if phase == "compile" else 30)
    folder = tmp_path / "run" / "checkpoints"
    found = [p.name for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    assert found == ([saved] if saved else [])
    process = start(tmp_path, "never")
    assert process.wait(timeout=180) == 0, process.stderr.read()[-2000:]
    assert (tmp_path / "kernel.npy").read_bytes() == unbroken[0]
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == unbroken[1]
    assert not (tmp_path / "run" / "partial.json").exists()
