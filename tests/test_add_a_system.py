"""docs/add_a_system.md: its example runs."""

import pathlib
import re

import numpy as np
import pytest

from rag_mm.stages import chain, chain_config

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def example() -> tuple[dict, dict]:
    """Names defined by the page's two code blocks: the stage module and the config page."""
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
