"""The chain of configs/emu.py:visual_tiny, what a loaded run draws, and its command."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import rag_mm
from rag_mm.core.document_types import Document, Image, Text
from rag_mm.core.errors import UserError
from rag_mm.core.image_files import encode_png

# 100 seconds of processor time for all tests.
pytestmark = pytest.mark.slow
CAPTION = "red apple at the top left on a blue background"


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)


def _rag_mm(*args, cwd):
    command = [sys.executable, "-m", "rag_mm", *args]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=1800
    )


@pytest.fixture(scope="module")
def visual_run(tiny_run, tmp_path_factory) -> pathlib.Path:
    """visual_tiny with the first four stages of quickstart:tiny."""
    folder = tmp_path_factory.mktemp("visual")
    args = ["train", "--config=configs/emu.py:visual_tiny", "--workdir=run"]
    done = _rag_mm(*args, "--reuse", tiny_run.workdir, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run"


@pytest.fixture(scope="module")
def session(visual_run):
    return rag_mm.load(str(visual_run))


def test_both_decoders_are_measured_on_the_same_scenes(visual_run):
    metrics = json.loads((visual_run / "metrics.json").read_text())
    assert metrics["rollouts"]["captions"] == metrics["emu_data"]["pairs"]
    assert metrics["rollouts"]["after_documents"] > 0
    names = {"loss", "loss_null", "seen_mse", "seen_place", "seen_color", "seen_entity"}
    for stage in ("visual_decoder", "visual_control"):
        assert names <= set(metrics[stage]["train"])
    found = metrics["visual_figures"]
    for split in ("held_out", "seen"):
        for variant in ("none", "oracle", "retrieved", "wrong", "encoded", "null", "guidance_2"):
            assert found[split]["mse"][variant]["n"] == 16
        # Guidance of the config's weight is what is drawn otherwise, by the same noise.
        assert found[split]["mse"]["guidance_2"] == found[split]["mse"]["none"]
        assert {"mse_none_minus_control_none", "mse_oracle_minus_none"} <= set(
            found[split]["paired"]
        )
    assert found["held_out_stories"]["entity"]["first_image"]["accuracy"] == 1


def test_the_page_has_claims_pictures_and_curves(visual_run):
    html = (visual_run / "visual.html").read_text()
    assert "<script" not in html and html.count('class="no"') + html.count('class="yes"') == 5
    # Twelve of each: captions with eight images, stories and blends with three, and the curves.
    assert html.count("<img") == 12 * (8 + 3 + 3) + 1


def test_noise_differs_by_image_and_seed(session):
    images = session.generate(CAPTION, num=3, seed=1).images
    assert images.dtype == np.uint8 and images.shape == (3, 32, 32, 3)
    assert (images[0] != images[1]).any() and (images[1] != images[2]).any()
    np.testing.assert_array_equal(session.generate(CAPTION, num=2, seed=1).images, images[:2])
    assert (session.generate(CAPTION, num=3, seed=2).images != images).any()


def test_documents_are_retrieved_by_the_text_and_read_before_it(session):
    found = session.generate(CAPTION, docs=2)
    scores = [each["score"] for each in found.neighbors]
    assert len(scores) == 2 and scores == sorted(scores)[::-1]
    documents = [Document("d", (Text("a dog"), Image(pixels(0))))]
    given = session.generate(CAPTION, documents=documents)
    assert [each["id"] for each in given.neighbors] == ["d"]
    spelled = session.generate(["a dog", pixels(0), CAPTION])
    np.testing.assert_allclose(given.images.astype(int), spelled.images.astype(int), atol=1)


def test_images_are_blended(session):
    blended = session.blend([pixels(0), pixels(1)], num=2).images
    assert blended.shape == (2, 32, 32, 3)
    spelled = session.generate([pixels(0), pixels(1)], num=2).images
    np.testing.assert_array_equal(blended, spelled)


def test_bad_requests_are_one_sentence(session):
    with pytest.raises(UserError, match="1 image cannot be blended"):
        session.blend([pixels(0)])
    with pytest.raises(UserError, match="num is 0"):
        session.generate(CAPTION, num=0)
    with pytest.raises(UserError, match="guidance is -2"):
        session.generate(CAPTION, guidance=-2.0)
    with pytest.raises(UserError, match="without a text retrieves nothing"):
        session.generate([pixels(0), pixels(1)], docs=1)


def test_the_command_draws_in_context(visual_run, tmp_path):
    (tmp_path / "a.png").write_bytes(encode_png(pixels(0)))
    args = ["generate", f"--workdir={visual_run}", f"--prompt={CAPTION}", "--image", "a.png"]
    args += ["--docs=1", "--num=2", "--guidance=1.5", "--out=drawn.png"]
    done = _rag_mm(*args, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["images"] == ["drawn-0.png", "drawn-1.png"] and len(result["neighbors"]) == 1
    refused = _rag_mm(*args, "--decoding=jacobi", cwd=tmp_path)
    assert refused.returncode == 2 and "--decoding is for decoders of image codes" in refused.stderr


def test_a_run_without_a_visual_decoder_says_what_trains_one(session, tiny_run, tmp_path):
    session = dataclasses.replace(session, visual_decoder=None)
    with pytest.raises(UserError, match="configs/emu.py:visual"):
        session.generate(CAPTION)
    (tmp_path / "a.png").write_bytes(encode_png(pixels(0)))
    args = ["generate", f"--workdir={tiny_run.workdir}", f"--prompt={CAPTION}", "--image", "a.png"]
    done = _rag_mm(*args, "--out=b.png", cwd=tmp_path)
    assert done.returncode == 2 and "--image is for runs of Emu" in done.stderr
