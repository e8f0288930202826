"""Fixtures: an encoder and an image tokenizer that need no training, and memories of killed writers."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import fresh_python
import killed_writers
import numpy as np
import pytest
from stand_in import StandInEncoder, StandInTokenizer


@pytest.fixture
def encoder():
    return StandInEncoder()


@pytest.fixture
def tokenizer():
    return StandInTokenizer()


@pytest.fixture(scope="session")
def killed_at_points(tmp_path_factory) -> pathlib.Path:
    """Folder of memories, named "ACTION POINT", whose writers were killed there; copy before changing."""
    folder = tmp_path_factory.mktemp("killed")
    program = pathlib.Path(killed_writers.__file__)
    done = fresh_python.run(program, "points", folder, check=True)
    signals = json.loads(done.stdout)
    assert set(signals.values()) == {int(signal.SIGKILL)}, signals
    return folder


@pytest.fixture(scope="module", params=range(20))
def killed_at_random(request, tmp_path_factory) -> tuple[pathlib.Path, int, int]:
    """A memory whose writer was killed at a random instant: (path, seed, operation in progress)."""
    seed, folder = request.param, tmp_path_factory.mktemp("killed")
    path, log = folder / "mem", folder / "log"
    program = killed_writers.__file__
    command = [sys.executable, program, "run", str(path), str(log), str(seed)]
    process = subprocess.Popen(command, env=fresh_python.environment())
    try:
        while not log.exists() or not log.read_text():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(np.random.default_rng(seed).uniform(0.0, 2.0))
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    return path, seed, int(log.read_text().split()[-1])
