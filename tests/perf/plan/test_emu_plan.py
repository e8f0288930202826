"""Plans of Emu: the published sizes, what does not split, and the step that is lowered."""

import dataclasses

import pytest

from rag_mm.core import configuration, sharding
from rag_mm.core.errors import UserError
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.models.emu.visual_decoder import VisualDecoderConfig
from rag_mm.perf import chips
from rag_mm.perf.plan import emu_programs, programs, rollout_programs, visual_programs

TOPOLOGY = chips.parse_topology("v5p:4x4x4")


def page(preset):
    return configuration.to_dict(configuration.load_config(f"configs/emu.py:{preset}"))


@pytest.mark.parametrize(("preset", "billions"), [("7b", 7.9), ("14b", 14.2)])
def test_pages_have_the_published_sizes_on_a_pod(preset, billions):
    case = emu_programs.make_case(page(preset), TOPOLOGY)
    facts = emu_programs.make_program(case).facts
    assert case.mesh_shape == (1, 64, 1)
    assert facts["num_params"] / 1e9 == pytest.approx(billions, abs=0.05)
    assert facts["seq_len"] == 1024 and facts["num_images"] == 5


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(UserError, match="A batch of 100 rows does not split over"):
        emu_programs.make_case(page("7b"), TOPOLOGY, batch_size=100)
    case = emu_programs.make_case(page("7b"), TOPOLOGY, batch_size=128, num_parts=1)
    assert emu_programs.vary(case, TOPOLOGY, "none", 4) is None
    other = emu_programs.vary(case, TOPOLOGY, "none", 2)
    assert other is not None and other.facts["remat"] == "none"


@pytest.mark.parametrize("has_tower", [True, False])
def test_the_step_of_a_tiny_model_is_lowered_with_its_images(has_tower):
    tiny = dataclasses.replace(EmuConfig.tiny(), has_tower=has_tower)
    made = emu_programs.EmuPlanPage("emu", tiny, batch_size=8, num_images=2, accumulate=2)
    case = emu_programs.EmuCase(made, (2, 2, 1))
    text = emu_programs.lower_train(case, sharding.make_mesh(2, 2, 1)).as_text()
    wanted = "tensor<8x2x16x16x3xui8>" if has_tower else "tensor<8x2x17x16xf16>"
    assert wanted in text and "tensor<8x64xi32>" in text


def test_a_rollout_reads_its_caption_once_and_decodes_all_codes_but_the_last():
    page_of = lambda batch: emu_programs.EmuPlanPage("emu", EmuConfig.tiny(), batch_size=batch)
    topology = chips.parse_topology("v5p:2x2x1")
    case = rollout_programs.make_case(page_of(8), topology, prompt_len=10)
    decoder, num_slots = case.model.decoder, case.model.num_slots
    program = rollout_programs.make_program(case)
    costs = program.costs(None)
    # By hand: weights of a layer, two FLOPs each; scores and values, four for each pair of a head's width.
    heads = decoder.block.num_heads * decoder.block.head_dim
    kv_heads = decoder.block.num_kv_heads * decoder.block.head_dim
    attention = decoder.embed_dim * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * decoder.embed_dim * decoder.mlp_dim
    tokens = 10 + num_slots - 1
    pairs = 10 * 11 / 2 + (num_slots - 1) * round(10 + num_slots / 2)
    wanted = decoder.num_layers * (2 * layer * tokens + 4 * heads * pairs)
    assert costs.item == "image" and costs.num_items == case.batch_size == 64 * case.mesh_shape[0]
    assert costs.flops == pytest.approx(wanted)
    assert program.facts["codes_per_image"] == num_slots
    text = rollout_programs.lower(case, sharding.make_mesh(*case.mesh_shape)).as_text()
    assert f"tensor<{case.batch_size}x10xi32>" in text
    with pytest.raises(UserError, match="do not fit a sequence of"):
        rollout_programs.make_case(page_of(8), topology, prompt_len=decoder.max_seq_len)
    with pytest.raises(UserError, match="A batch of 3 captions does not split"):
        rollout_programs.make_case(
            page_of(8), topology, prompt_len=9, batch_size=3, mesh_shape=(2, 1, 2)
        )


@pytest.mark.slow
def test_the_step_of_a_visual_decoder_trains_the_network_alone():
    model = VisualDecoderConfig.tiny()
    made = visual_programs.VisualPlanPage("emu_visual", model, batch_size=8, accumulate=2)
    case = visual_programs.VisualCase(made, (4, 1, 1))
    text = visual_programs.lower_train(case, sharding.make_mesh(4, 1, 1)).as_text()
    assert "tensor<8x16x16x3xui8>" in text and "tensor<8x2x6xf16>" in text
    compiled = programs.Compiled(True, 1, 2, flops=10.0, moved_bytes=3.0)
    topology = chips.parse_topology("v5p:2x2x1")
    costs = visual_programs.make_program(case, topology).costs(compiled)
    # A part's FLOPs of each of four chips, twice, for eight images.
    assert costs.flops == 10 and costs.hbm_bytes == 6
    assert visual_programs.vary(case, topology, "full", 2) is None
    assert visual_programs.vary(case, topology, "none", 4) is None
    assert visual_programs.vary(case, topology, "none", 1).facts["num_parts"] == 1


@pytest.mark.slow
def test_the_page_of_the_visual_decoder_has_the_published_size():
    facts = visual_programs.make_program(
        visual_programs.make_case(page("sd15"), TOPOLOGY), TOPOLOGY
    )
    # The U-Net, whose keys and values read 5,120 in place of 768 values, and the autoencoder.
    assert facts.facts["num_params"] / 1e6 == pytest.approx(859.5 + 83.7, rel=0.2)
    assert facts.facts["batch_size"] == 1600
