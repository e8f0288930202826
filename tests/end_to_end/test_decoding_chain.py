"""The stage `decoding` on the tiny quickstart: what it leaves, that it resumes, and what it refuses."""

import shutil

import numpy as np
import pytest

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.stages import chain, chain_config
from rag_mm.stages.cm3leon import decoding_settings

pytestmark = pytest.mark.slow
PRESET = "configs/cm3leon.py:decoding_tiny"


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoding") / "run"
    return chain.run_chain(chain_config.load(PRESET), folder, reuse_from=[tiny_run.workdir])


@pytest.fixture(scope="module")
def settings():
    config = chain_config.stage_configs(chain_config.load(PRESET))["decoding"]
    return {setting.name: setting for setting in decoding_settings.settings(config)}


def test_every_setting_has_codes_and_figures_for_every_scene(run, settings):
    measured = files.read_json(run.finished_stage("decoding") / "per_document.json")["held_out"]
    assert set(measured) > set(settings)
    for name in settings:
        assert files.read_array(run.stage_dir("decoding") / f"{name}_codes.npy").shape == (16, 64)
        assert {len(values) for values in measured[name].values()} == {16}
    assert "entropy" in measured["contrast_k1_a0.1_bare_t1"]
    assert "entropy" not in measured["bare_w1_t0.4"]
    assert (
        1
        <= min(measured["jacobi_plain_t1"]["passes"])
        <= max(measured["jacobi_plain_t1"]["passes"])
        <= 63
    )


def test_what_is_exact_holds_for_a_model_that_learned_nothing(run):
    claims = {claim["claim"]: claim["is_met"] for claim in run.metrics["decoding"]["claims"]}
    for exact in (
        "At weight 1 guidance draws the codes of plain sampling",
        "CD-K with k = 1 and alpha = 1 is greedy decoding",
        "Parallel decoding equals greedy sampling at temperature 0",
    ):
        assert claims[exact] is True


def test_the_page_shows_all_of_it_and_speed_is_a_cost(run):
    html = (run.workdir / "decoding.html").read_text()
    assert "<script" not in html and "The retriever has seen other images" in html
    for shown in ("At weight 1 guidance", "bare_w1.5_t1_plausible0.1", "those of a CPU", "cosine"):
        assert shown in html
    assert html.count('class="kept"') == 2 and ">nan" not in html
    costs = run.metrics["decoding_speed"]
    assert costs["guidance_batch4_ms"] > 0 and costs["plain_batch1_passes"] == 63
    assert costs["jacobi_batch1_passes"] < 63


def test_an_interrupted_stage_goes_on_with_the_next_setting(run, tmp_path):
    """Half of the settings are there, from a stage that never finished."""
    copy = shutil.copytree(run.workdir, tmp_path / "copy")
    manifest = files.read_json(copy / "decoding" / "manifest.json")
    manifest |= {"status": "running", "fingerprint": "", "outputs": {}, "metrics": {}}
    files.write_json(copy / "decoding" / "manifest.json", manifest)
    (copy / "decoding" / "per_document.json").unlink()
    (copy / "decoding" / "plain_t1.json").unlink()
    kept = copy / "decoding" / "bare_w3_t1_codes.npy"
    before = kept.stat().st_mtime_ns
    again = chain.run_chain(chain_config.load(PRESET), copy)
    assert again.manifest("decoding").fingerprint == run.manifest("decoding").fingerprint
    assert kept.stat().st_mtime_ns == before


def test_a_null_prompt_that_training_never_showed_is_refused_by_name(run, tmp_path):
    unseen = {"decoder.masking.caption_prob": 0.0, "decoder.masking.segment_prob": 0.0}
    short = {"decoder.loop.num_steps": 2, "decoding.num_scenes": 2}
    page = chain_config.load(PRESET, unseen | short)
    with pytest.raises(UserError, match="never saw the null prompt 'bare'"):
        chain.run_chain(page, tmp_path / "run", reuse_from=[run.workdir])
    shown = chain_config.load(PRESET, unseen | short | {"decoding.shows_unseen_nulls": True})
    made = chain.run_chain(shown, tmp_path / "run")
    assert np.isfinite(made.metrics["decoding"]["settings"]["bare_w1.5_t1"]["joint"]["accuracy"])
