"""`rag-mm doctor` checks everything, even if jax cannot start."""

import argparse
import io
import json
import re
import sys

import pytest
import rich.console

from rag_mm.cli import doctor, main
from rag_mm.core.errors import UserError


def test_json_names_versions_devices_and_disk(capfd, tmp_path):
    code = main.main(["doctor", "--json", f"--workdir={tmp_path}"])
    result = json.loads(capfd.readouterr().out)
    assert code == (0 if result["ok"] else 1)
    assert result["versions"]["jax"].startswith("0.") and result["backend"] == "cpu"
    assert result["disk_free_gb"] > 0 and result["cores"] >= 1 and result["devices"]
    if sys.platform == "linux":
        assert result["scann"] == "loads"


def test_an_unknown_xla_flag_is_reported(monkeypatch):
    """jax exits on such a flag, so it is started in a subprocess."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    found = doctor._devices()
    assert found["backend"] is None
    assert "xla_no_such_flag" in found["problems"][0]


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Puts a package in front of the installed one of that name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, source: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)

    return write


def test_what_commands_import_is_imported(broken):
    """jax and ScaNN start, and pip is content, but no command that loads a model does."""
    broken("flax", "raise ImportError('HiPrimitive is not in jax.experimental.hijax')")
    # An extra that is not installed is no problem.
    broken("starlette", "raise ModuleNotFoundError('No module starlette', name='starlette')")
    (problem,) = doctor._import_problems()
    assert re.search(r"rag_mm\.api\.\w+ and \d+ other modules cannot be imported", problem)
    assert "HiPrimitive is not in jax.experimental.hijax" in problem and "pip install" in problem


def test_an_import_that_ends_the_process_is_named(broken):
    broken("anyio", "import os; os.abort()")
    (problem,) = doctor._import_problems()
    assert "the import of rag_mm.api.explore_server ended Python" in problem


def test_a_wrong_libtpu_is_named(monkeypatch):
    versions = {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": "0.0.41.1"}
    monkeypatch.setattr(doctor, "required_libtpu", lambda: "0.0.42.*")
    (problem,) = doctor._version_problems(versions)
    assert "requires libtpu 0.0.42.*, not 0.0.41.1" in problem
    assert not doctor._version_problems({**versions, "libtpu": "0.0.42.1"})
    assert doctor._version_problems({**versions, "libtpu": "0.0.420"})


def test_the_installed_jax_names_its_required_libtpu():
    assert doctor.required_libtpu().split(".")[0].isdigit()


def test_problems_are_printed():
    output = io.StringIO()
    result = {"ok": False, "problems": ["Only 1 GB of disk is free."], "versions": {"jax": None}}
    doctor.show(result, rich.console.Console(file=output))
    assert "! Only 1 GB of disk is free." in output.getvalue()
    assert "No problems found" not in output.getvalue()


def test_a_missing_folder_is_a_user_error():
    with pytest.raises(UserError, match="is not a folder"):
        doctor.run(argparse.Namespace(workdir="no/such/folder"))


def test_without_a_home_or_a_name_fonts_are_still_looked_for(monkeypatch):
    """As in a container that runs under a user id of its own."""

    def unknown(number):
        raise KeyError(f"uid not found: {number}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr(doctor, "FONTS", ("~/.fonts", "/nowhere"))
    assert doctor._emoji_font() is None
