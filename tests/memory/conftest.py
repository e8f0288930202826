"""Fixtures: an encoder and an image tokenizer that need no training, and memories of killed writers."""

import json
import pathlib
import signal

import fresh_python
import killed_writers
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
    done = fresh_python.run(program, folder, check=True)
    signals = json.loads(done.stdout)
    assert set(signals.values()) == {int(signal.SIGKILL)}, signals
    return folder
