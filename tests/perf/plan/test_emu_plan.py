"""Plans of Emu: the published sizes, what does not split, and the step that is lowered."""

import dataclasses

import pytest

from rag_mm.core import configuration, sharding
from rag_mm.core.errors import UserError
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.perf import chips
from rag_mm.perf.plan import emu_programs

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
