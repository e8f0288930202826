"""Fixtures: a folder and tar files that hold every kind of record in `hostile`."""

import os
import pathlib
import tarfile
from collections.abc import Callable

import hostile
import pytest

from rag_mm.data import webdataset


@pytest.fixture(scope="session")
def hostile_folder(tmp_path_factory) -> pathlib.Path:
    """Every image and caption line of `hostile` except the duplicate; read only."""
    folder = tmp_path_factory.mktemp("hostile")
    lines = []
    for name, (data, _) in hostile.IMAGES.items():
        (folder / name).write_bytes(data)
        lines.append(hostile.line(name))
    (folder / "good.png").write_bytes(hostile.encoded(hostile.pixels(5)))
    (folder / "sub").mkdir()
    (folder / "sub" / "plain.png").write_bytes(hostile.encoded(hostile.pixels(6)))
    os.mkfifo(folder / "pipe.png")
    lines += [line for line, reason in hostile.LINES.items() if reason != "duplicate-id"]
    (folder / "captions.jsonl").write_bytes(b"\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def make_tar() -> Callable[[pathlib.Path, Callable], webdataset.TarSource]:
    """Writes FOLDER/a.tar with the members that `fill(tar)` adds."""

    def make(folder: pathlib.Path, fill: Callable) -> webdataset.TarSource:
        with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            fill(tar)
        return webdataset.TarSource([folder / "a.tar"])

    return make
