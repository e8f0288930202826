"""Hundreds of edits of a finished run and its memory: each gets the answer that its kind of file says."""

import json
import pathlib
import shutil
import signal

import edited_files
import pytest

from rag_mm.cli import main
from rag_mm.core import run_folder
from rag_mm.core.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_run) -> pathlib.Path:
    """A copy of the finished run; every edit of it is undone."""
    return pathlib.Path(
        shutil.copytree(tiny_run.workdir, tmp_path_factory.mktemp("edited") / "run")
    )


@pytest.fixture(autouse=True)
def no_waiting():
    """A test that waits, such as for somebody to write into a pipe, fails."""
    signal.alarm(400)
    yield
    signal.alarm(0)


def ask(capsys, *words):
    """Exit code, stdout and stderr of a command in this process."""
    code = main.main(["memory", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def is_one_sentence(text: str) -> bool:
    return text.startswith("rag-mm: ") and text.count("\n") == 1 and "Traceback" not in text


def check_stage(run: pathlib.Path, edit: edited_files.Edit, fingerprint: str) -> str | None:
    """What is wrong with the answer of the edited file's stage, or None."""
    stage = edit.file.split("/")[0]
    try:
        opened = run_folder.Run(run_folder.epath.Path(run))
        opened.finished_stage(stage)
        same = opened.manifest(stage).fingerprint == fingerprint
        answer = edited_files.SAME if same else "another answer"
    except UserError as error:
        answer = edited_files.REFUSED if stage in str(error) else f"no word of {stage}: {error}"
    allowed = edited_files.answer_of_stage(edit)
    return None if answer in allowed else f"{edit}: {answer}, not {' or '.join(allowed)}"


def check_memory(run, capsys, edit: edited_files.Edit, stats: str) -> str | None:
    """What is wrong with the answers of `memory verify` and `memory stats`, or None."""
    code, out, err = ask(capsys, "verify", run / "memory", "--json")
    if code not in edited_files.exit_code_of_verify(edit):
        return f"{edit}: verify ends with {code}: {out}{err}"
    if code == 1 and not any(
        pathlib.Path(edit.file).stem in p for p in json.loads(out)["problems"]
    ):
        return f"{edit}: verify does not name the file: {out}"
    code, out, err = ask(capsys, "stats", run / "memory", "--json")
    if (code, out) != (0, stats) and not (code == 2 and is_one_sentence(err)):
        return f"{edit}: stats ends with {code}: {out}{err}"
    return None


def check_all(run, capsys, per_file: int) -> int:
    """Checks edits of all files and that none is left; returns their number."""
    edits = edited_files.edits_of(run, per_file)
    opened = run_folder.Run(run_folder.epath.Path(run))
    stages = sorted({edit.file.split("/")[0] for edit in edits})
    fingerprints = {stage: opened.manifest(stage).fingerprint for stage in stages}
    code, stats, _ = ask(capsys, "stats", run / "memory", "--json")
    assert code == 0
    wrong = []
    for edit in edits:
        with edited_files.applied(run, edit):
            wrong.append(check_stage(run, edit, fingerprints[edit.file.split("/")[0]]))
            if edit.file.startswith("memory/"):
                wrong.append(check_memory(run, capsys, edit, stats))
    assert not any(wrong), "\n".join(text for text in wrong if text)
    for stage in stages:
        opened.finished_stage(stage)
    assert ask(capsys, "verify", run / "memory")[0] == 0
    return len(edits)


@pytest.mark.slow
def test_six_edits_of_every_file_get_their_answer(run, capsys):
    assert check_all(run, capsys, 6) >= 1200


def test_an_edit_of_every_file_gets_its_answer(run, capsys):
    assert check_all(run, capsys, 1) >= 200
