"""The config of instruction tuning: shares of its mixture, what it has shown, and what it refuses."""

import dataclasses

import pytest

from rag_mm.core import manifest_values
from rag_mm.core.errors import UserError
from rag_mm.stages import chain_config
from rag_mm.stages.cm3leon import edit_guidance, scene_examples, scene_instructions


def make(**overrides):
    config = chain_config.load(
        "configs/cm3leon.py:sft_tiny", {f"sft.{name}": value for name, value in overrides.items()}
    )
    return chain_config.stage_configs(config)["sft"]


def test_text_to_image_has_a_fifth_and_the_others_are_capped():
    config = make(tasks={"text_to_image": 100, "recolor": 100, "swap": 10, "caption": 3000})
    # Mean 802.5: 3, 3, 3 and .3 times their size are 300, 300, 30 and 900.
    shares = {"text_to_image": 300, "recolor": 300, "swap": 30, "caption": 900}
    assert config.shares() == pytest.approx(
        {name: n / 1530 for name, n in shares.items()}, abs=0.01
    )
    config = make(tasks={"text_to_image": 10, "recolor": 90}, mixing="proportional")
    assert config.shares() == pytest.approx({"text_to_image": 0.2, "recolor": 0.8})
    config = make(tasks={"recolor": 90}, text_to_image_share=0.0)
    assert config.shares() == {"recolor": 1.0}


def test_files_are_mixed_like_tasks():
    config = make(tasks={"text_to_image": 100, "recolor": 100}, text_to_image_share=0.0)
    assert config.shares({"vqav2:x": 100}) == pytest.approx(
        {"text_to_image": 1 / 3, "recolor": 1 / 3, "vqav2:x": 1 / 3}
    )


def test_null_prompts_are_those_of_the_mixture():
    assert make().null_prompts == ["documents", "bare", "caption"]
    assert make(text_mask_prob=0.0).null_prompts == ["caption"]
    assert make(num_docs_weights=(0.0, 1.0)).null_prompts == ["documents"]


def test_documents_of_a_task():
    def weights(name, max_docs=2):
        task = scene_instructions.find(name)
        return scene_examples.weights_of(task, (0.2, 0.4, 0.4), max_docs)

    assert weights("recolor") == (1.0,)
    assert weights("caption") == (0.0, 1.0)
    assert weights("text_to_image") == (0.2, 0.4, 0.4)
    with pytest.raises(UserError, match="swap puts 2 documents before the main one"):
        weights("swap", max_docs=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tasks": {"paint": 3}}, "no task 'paint'"),
        ({"also_measured": ("paint",)}, "no task 'paint'"),
        ({"tasks": {"text_to_image": 0}}, "sizes to mix"),
        ({"tasks": {"recolor": 3}}, "text_to_image is no task"),
        ({"mixing": "even"}, "mixing is 'even'"),
        ({"max_repeats": 0.5}, "thresholds are 0.5 / 0.3"),
        ({"text_to_image_share": 1.0}, "text_to_image_share is 1.0"),
        ({"start_from": "sft"}, "the stage itself"),
        ({"num_test": 1}, "num_test is 1"),
        ({"num_docs_weights": (0.0,)}, "num_docs_weights are"),
        ({"text_mask_prob": 2.0}, "text_mask_prob is 2.0"),
        ({"temperature": -1.0}, "temperature"),
        ({"files": ("flickr:data",)}, "is not LAYOUT:PATH"),
        ({"files": ("vqav2:no/such/folder",)}, "no/such/folder does not exist"),
        ({"files": ("vqav2:tests", "vqav2:tests")}, "name each once"),
        ({"edit_weights": ((0.0, 1.0),)}, "lacks .1, 1."),
        ({"edit_weights": ((1.0, 1.0, 1.0),)}, "edit_weights"),
        ({"edit_weights": ((1.0, 1.0), (-1.0, 1.0))}, "image weight is -1.0"),
    ],
)
def test_nonsense_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        make(**overrides)


def test_there_is_a_decoder_to_start_from():
    with pytest.raises(ValueError, match="name a stage of the run"):
        dataclasses.replace(make(), start_from=None)


@pytest.mark.parametrize("preset", ["sft", "tuning"])
def test_the_figures_of_the_ablation_are_those_of_the_tasks(preset):
    page = chain_config.load(f"configs/cm3leon.py:{preset}")
    for name in page["sft"]["tasks"]:
        figure = scene_instructions.find(name).figure
        assert f"held_out.tuned_{name}.{figure}" in page["ablation"]["figures"]
    weights = chain_config.stage_configs(page)["sft"].edit_weights
    guided = {edit_guidance.name(task, pair) for task in ("recolor", "move") for pair in weights}
    named = {figure.split(".", 1)[1].rpartition(".")[0] for figure in page["ablation"]["figures"]}
    assert {name for name in named if name.startswith("guided")} <= guided
    for overrides in page["ablation"]["variants"].values():
        chain_config.stage_configs(chain_config.override(page, overrides))


def test_a_run_without_two_conditions_is_the_same_run():
    """Its manifest does not name weights that are the default."""
    assert "edit_weights" not in manifest_values.recorded(make(edit_weights=edit_guidance.WEIGHTS))
    config = make(edit_weights=[[1, 1], [0, 1]])
    assert manifest_values.recorded(config)["edit_weights"] == ((1.0, 1.0), (0.0, 1.0))
