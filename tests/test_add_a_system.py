"""docs/add_a_system.md keeps its word: its example runs, and systems import no others."""

import ast
import pathlib
import re

import numpy as np
import pytest

from rag_mm.stages import chain, chain_config

ROOT = pathlib.Path(__file__).parent.parent
STAGES = ROOT / "rag_mm" / "stages"
# The system that a paper builds on, where it builds on one of ours.
BUILDS_ON = {"cm3leon": "ra_cm3"}


@pytest.fixture
def example() -> tuple[dict, dict]:
    """What the page's two blocks define: the stage's module, and the config page's."""
    page = (ROOT / "docs" / "add_a_system.md").read_text()
    stage, config = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    modules: tuple[dict, dict] = ({"__name__": "stage"}, {"__name__": "config"})
    for source, module in zip((stage, config), modules, strict=True):
        exec(compile(source, "docs/add_a_system.md", "exec"), module)
    return modules


def test_the_pages_stage_runs_in_a_chain_and_is_skipped_when_finished(
    example, tmp_path, monkeypatch
):
    stage, config = example
    monkeypatch.setitem(chain_config.STAGES, "mean_image", stage["STAGES"]["mean_image"])
    page = config["get_config"](config["PRESETS"][0])
    run = chain.run_chain(page, tmp_path)
    mean = np.load(tmp_path / "mean_image" / "mean.npy")
    assert mean.shape == (32, 32, 3)
    assert run.metrics["mean_image"]["brightness"] == pytest.approx(mean.mean() / 255)
    manifest = run.manifest("mean_image")
    assert manifest.is_done and manifest.config["num_images"] == 16
    assert chain.run_chain(page, tmp_path).manifest("mean_image") == manifest


def test_the_pages_stage_refuses_what_it_cannot_do(example):
    with pytest.raises(ValueError, match="num_images is 0"):
        example[0]["MeanImageStageConfig"](seed=0, world=None, num_images=0)


def test_a_system_imports_at_most_the_one_it_builds_on():
    """The engine imports none but for the table of `chain_config`, and the shared stages none at all."""
    systems = {path.parent.name for path in STAGES.glob("*/stages.py")} - {"shared"}
    wrong = []
    for path in sorted(STAGES.rglob("*.py")):
        own = path.parent.name
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                system = name.removeprefix("rag_mm.stages.").split(".")[0]
                is_stage = name.startswith("rag_mm.stages.") and system in systems
                if is_stage and system not in (own, BUILDS_ON.get(own)):
                    wrong.append(f"{path.relative_to(STAGES)} imports {name}")
    tables = {f"chain_config.py imports rag_mm.stages.{system}.stages" for system in systems}
    assert set(wrong) == tables
