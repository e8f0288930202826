"""Fixtures: a quickstart in an empty folder, and copies of the finished one to spoil or to call tuned."""

import dataclasses
import pathlib
import shutil

import pytest
from etils import epath
from whole_run import Quickstart

from rag_mm.core import files, run_folder


@pytest.fixture
def quickstart(tmp_path) -> Quickstart:
    """The chain in a folder that does not exist yet."""
    return Quickstart(tmp_path / "run")


@pytest.fixture
def finished(tmp_path, tiny_run) -> pathlib.Path:
    """A copy of the finished run."""
    return pathlib.Path(shutil.copytree(tiny_run.workdir, tmp_path / "finished"))


@pytest.fixture(scope="session")
def called_tuned(tmp_path_factory, tiny_run) -> pathlib.Path:
    """A copy of the finished run whose stage `sft` says that it was tuned, but is the decoder."""
    folder = tmp_path_factory.mktemp("called_tuned") / "run"
    shutil.copytree(tiny_run.workdir, folder)
    shutil.copytree(folder / "decoder", folder / "sft")
    run = run_folder.Run(epath.Path(folder))
    decoder = run.manifest("decoder")
    tasks = ("recolor", "swap", "draw_boxes", "from_silhouette", "from_edges", "what")
    config = {**decoder.config, "tasks": dict.fromkeys(tasks, 8)}
    tuned = dataclasses.replace(decoder, stage="sft", config=config)
    tuned = dataclasses.replace(tuned, fingerprint=run_folder._fingerprint(tuned))
    files.write_json(folder / "sft" / run_folder.MANIFEST, dataclasses.asdict(tuned))
    return folder
