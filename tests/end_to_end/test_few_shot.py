"""RICES in use: few-shot captions of a finished run, by every view and by lot."""

import numpy as np
import pytest

from rag_mm.cli import main
from rag_mm.core import files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.stages import chain_config
from rag_mm.stages.ra_cm3 import few_shot
from rag_mm.stages.shared import build_memory

PAGE = "configs/few_shot.py:tiny"


@pytest.fixture(scope="module")
def config():
    page = chain_config.load(PAGE)
    return chain_config.stage_configs(page)["few_shot"]


def test_examples_are_nearest_in_the_view_and_the_best_stands_last(tiny_run, config):
    memory = build_memory.open_memory(run_folder.open_run(tiny_run.workdir))
    pictures = np.stack([memory.document(row).image for row in (3, 8)])
    queries = memory.encode(image=pictures)
    for view in config.views:
        chosen = few_shot.select(config, memory, queries, view, 2)
        best = memory.search(vectors=queries, view=view, k=2)
        np.testing.assert_array_equal(chosen.ids, best.ids[:, ::-1])
    assert few_shot.select(config, memory, queries, "image", 1).ids[:, 0].tolist() == [3, 8]
    by_lot = few_shot.select(config, memory, queries, few_shot.RANDOM, 2)
    again = few_shot.select(config, memory, queries, few_shot.RANDOM, 2)
    assert by_lot.ids.shape == (2, 2) and (by_lot.ids == again.ids).all()
    assert few_shot.select(config, memory, queries, "text", 0).ids.shape == (2, 0)


@pytest.mark.slow
def test_a_finished_quickstart_is_asked(finished):
    words = ["train", f"--config={PAGE}", f"--workdir={finished}", "--stage=few_shot"]
    assert main.main(words) == 0
    measured = files.read_json(finished / "metrics.json")["few_shot"]
    assert set(measured) == {"image", "text", "mixed", "random"}
    values = files.read_json(finished / "few_shot" / few_shot.PER_DOCUMENT)
    for selection, figures in measured.items():
        assert set(figures) == {"cider", "names"}
        assert set(figures["names"]) == {"shots0", "shots1", "shots2"}
        for shots, found in figures["names"].items():
            hits = values[selection][shots]["names"]
            assert len(hits) == found["n"] == 16 and found["accuracy"] == np.mean(hits)
    # Without examples it does not matter how they would have been chosen.
    assert len({str(figures["cider"]["shots0"]) for figures in measured.values()}) == 1
    written = files.read_json(finished / "few_shot" / "image_shots2.json")["captions"]
    assert len(written) == 16 and all(isinstance(text, str) for text in written)
    # The quickstart's own stages still stand.
    assert files.read_json(finished / "decoder" / "manifest.json")["status"] == "done"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("shots", (-1,), "shots are"),
        ("views", ("smell",), "no view 'smell'"),
        ("order", "upside_down", "unknown order 'upside_down'"),
        ("num_test", 1, "num_test is 1"),
    ],
)
def test_mistakes(key, value, says):
    page = chain_config.load(PAGE)
    page["few_shot"][key] = value
    with pytest.raises(UserError, match=says):
        chain_config.stage_configs(page)
