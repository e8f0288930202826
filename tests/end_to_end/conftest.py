"""Fixtures: a quickstart in an empty folder, and a copy of the finished one to spoil."""

import pathlib
import shutil

import pytest
from whole_run import Quickstart


@pytest.fixture
def quickstart(tmp_path) -> Quickstart:
    """The chain in a folder that does not exist yet."""
    return Quickstart(tmp_path / "run")


@pytest.fixture
def finished(tmp_path, tiny_run) -> pathlib.Path:
    """A copy of the finished run."""
    return pathlib.Path(shutil.copytree(tiny_run.workdir, tmp_path / "finished"))
