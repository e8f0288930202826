"""SIGTERM in real processes: what is finished is on disk, exit code 143, and going on gives the same bits."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import pathlib, sys, time
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
sys.path.insert(0, sys.argv[1])
from test_loop import begin, loss_fn, SCHEDULE
from rag_mm.train import loop

folder, phase, at = pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def here(name):
    if name == phase:
        (folder / "here").touch()
        time.sleep(1.0)

parts = begin()
step_fn, count = parts["step_fn"], 0

def slow_step(state, batch):
    global count
    count += 1
    if count == at:
        here("step")
    if count == 1 and phase == "compile":
        (folder / "here").touch()
        # Like a compile: the interpreter does not come by.
        import ctypes
        ctypes.PyDLL(None).sleep(20)
    return step_fn(state, batch)

def watch(step, params):
    here("eval") if step == 4 else None
    return {}

parts["step_fn"] = slow_step
save = loop.checkpoint.Checkpoints.save

def slow_save(self, state, iterator, on_commit=None):
    if int(state.step) == 4:
        here("save")
    save(self, state, iterator, on_commit)

loop.checkpoint.Checkpoints.save = slow_save
state, rows = loop.fit("line", directory=folder / "run", config=SCHEDULE, watch=watch, **parts)
np.save(folder / "kernel.npy", np.asarray(state.params["kernel"]))
"""


def start(folder, phase, at=3):
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(SCRIPT)
    tests = str(pathlib.Path(__file__).parent)
    command = [sys.executable, str(script), tests, str(folder), phase, str(at)]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=_environment(), cwd=folder
    )


def _environment():
    import os

    return {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def end(process, folder):
    """Sends SIGTERM as soon as the process is where it should be; exit code and seconds."""
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
def test_a_run_that_is_told_to_end_loses_no_step(unbroken, tmp_path, phase, saved):
    """The third step lies between two logs: its sums are kept too."""
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
