"""The settings that follow from the config of the stage `decoding`, and what it refuses."""

import pytest

from rag_mm.core.errors import UserError
from rag_mm.decode import contrastive_decoding, guidance, tasks
from rag_mm.stages.cm3leon import decoding_settings
from rag_mm.stages.cm3leon.decoding_settings import DecodingStageConfig
from rag_mm.stages.shared.world_config import EmojiWorld

WORLD = EmojiWorld()


def make(**values):
    return DecodingStageConfig(seed=0, world=WORLD, **values)


def test_every_setting_has_a_name_of_its_own_that_says_how_it_samples():
    settings = {setting.name: setting for setting in decoding_settings.settings(make())}
    found = settings["bare_w1.5_t1_plausible0.1"]
    assert found.steering == guidance.Guidance(1.5, guidance.BARE, plausible=0.1)
    found = settings["contrast_k4_a0.5_bare_floor0.1_t1"]
    assert found.steering == contrastive_decoding.Contrast(4, 0.5, 1.0, 0.1, guidance.BARE)
    assert settings["two_conditions_d1.5_w1_t1"].steering == guidance.Guidance(
        1, documents_weight=1.5
    )
    found = settings["jacobi_uncoupled_plain_t0.7"]
    assert (found.temperature, found.steering) == (0.7, None)
    assert found.decoding == tasks.JACOBI_UNCOUPLED
    assert settings["plain_t0"].sampling.temperature == 0


def test_the_sweep_is_whole_and_candidates_differ_in_their_seeds_alone():
    config = make()
    assert len(decoding_settings.sweep(config)) == 3 * 3 * 6
    candidates = decoding_settings.candidates(config)
    assert [setting.candidate for setting in candidates["plain"]] == list(range(16))
    assert candidates["plain"][0] == decoding_settings.plain(1.0)
    assert {setting.steering for setting in candidates["contrast"]} == {
        contrastive_decoding.Contrast()
    }


def test_what_is_decoded_in_parallel_is_also_decoded_in_sequence():
    """Even where the sweep does not have it."""
    config = make(weights=(0.0, 1.0), temperatures=(1.0,), jacobi_temperatures=(0.3,))
    names = {setting.name for setting in decoding_settings.settings(config)}
    assert {"plain_t0.3", "jacobi_plain_t0.3", "bare_w1.5_t1", "jacobi_bare_w1.5_t1"} <= names


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"weights": (-1.0,)}, "guidance weight is -1"),
        ({"contrasts": ((0, 0.1, 1.0, 0.0, "bare"),), "ranked_contrast": 0}, "contrast k is 0"),
        ({"nulls": ("empty",)}, "null is 'empty'"),
        ({"nulls": ()}, "nulls is empty"),
        ({"temperatures": (0.4,)}, "1 must be among them"),
        ({"temperatures": (1.0, -1.0)}, "temperature must be at least 0"),
        ({"jacobi_temperatures": (-0.5,)}, "temperature must be at least 0"),
        ({"num_candidates": (1, 3, 8)}, "divisors of the last"),
        ({"ranked_contrast": 11}, "one of the 11 contrasts"),
        ({"speed_batches": (0,)}, "speed_batches"),
        ({"num_scenes": 1}, "num_scenes is 1"),
    ],
)
def test_what_cannot_be_is_refused_by_name(values, says):
    with pytest.raises((UserError, ValueError), match=says):
        make(**values)
