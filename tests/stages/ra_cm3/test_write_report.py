"""The stage `report` shows one document per class, and rejects a damaged reference before anything runs."""

import pytest

from rag_mm.core.errors import UserError
from rag_mm.stages import chain, chain_config
from rag_mm.stages.ra_cm3 import generate_samples, write_report
from rag_mm.stages.shared import world_config
from rag_mm.worlds.emoji import art

WORLD = world_config.EmojiWorld(("easy",), class_share=0.2)


def select(**changes):
    config = write_report.ReportStageConfig(
        0, WORLD, generate_samples.GenerationStageConfig(0, WORLD), **changes
    )
    source = WORLD.scenes("test", *world_config.HELD_OUT)
    rows = world_config.sample_rows(source, 100, 0)
    # Only the classes matter.
    test = generate_samples.TestSet(source.class_ids[rows], *[None] * 7)
    return write_report.select_examples(config, test), source.class_ids[rows]


def test_every_class_is_shown_once_starting_with_the_story():
    selected, class_ids = select(num_flags=3, num_others=4, num_rows=12)
    ids = class_ids[selected.indices]
    assert len(ids) == len(set(ids)) == 12
    story = art.load_art().is_flag[ids[:7]]
    assert (selected.num_story, selected.num_flags, story.sum()) == (7, 3, 3)
    assert list(selected.indices[:7]) == sorted(selected.indices[:7])
    assert "3 flags and 4 others" in selected.rule


def test_the_story_is_never_shortened():
    selected, _ = select(num_rows=2)
    assert len(selected.indices) == selected.num_story == 10


@pytest.mark.parametrize("change", [{"num_flags": "-1"}, {"num_others": "-1"}, {"num_rows": "0"}])
def test_wrong_counts_are_rejected(change):
    overrides = {f"report.{key}": value for key, value in change.items()}
    config = chain_config.load("configs/quickstart.py:tiny")
    config["report"] |= {key.split(".")[1]: int(value) for key, value in overrides.items()}
    with pytest.raises(UserError, match="give at least"):
        chain_config.stage_configs(config)


def test_a_damaged_reference_is_rejected_before_anything_runs(tmp_path):
    config = chain_config.load("configs/quickstart.py:tiny")
    config["report"]["reference"] = str(tmp_path / "curves.json")
    assert chain_config.stage_configs(config)["report"].reference
    (tmp_path / "curves.json").write_text("{")
    with pytest.raises(UserError, match=r"curves\.json is not readable JSON"):
        chain.run_chain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
