"""Every damaged checkpoint folder of a table is refused in one sentence about it; nothing is written."""

import shutil
import signal

import damaged_folders
import pytest

from rag_mm.api import importing
from rag_mm.core.errors import UserError

CASES = damaged_folders.cases()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    return {
        is_sharded: damaged_folders.write(folder / str(is_sharded), is_sharded)
        for is_sharded in (False, True)
    }


@pytest.fixture
def no_waiting():
    """A case that waits, such as for somebody to write into a pipe, fails."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def test_there_are_enough_cases():
    assert sum(bool(case.words) for case in CASES.values()) >= 100


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("name", CASES)
def test_a_damaged_folder_is_refused_by_name(tmp_path, sound, name):
    case, folder = CASES[name], tmp_path / "checkpoint"
    shutil.copytree(sound[case.is_sharded], folder)
    case.change(folder)
    if not case.words:
        importing.open_checkpoint("llama", folder)
        return
    with pytest.raises(UserError) as caught:
        importing.import_checkpoint("llama", folder, tmp_path / "run")
    message = str(caught.value)
    assert [word for word in case.words if word not in message] == [], message
    assert len(message) < 700
    assert not (tmp_path / "run").exists()
