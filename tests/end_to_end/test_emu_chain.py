"""The chain of configs/emu.py:tiny, what a loaded run answers, and its command."""

import json
import subprocess
import sys

import numpy as np
import pytest

import rag_mm
from rag_mm.core.document_types import Document, Image, Text
from rag_mm.core.errors import UserError
from rag_mm.core.image_files import encode_png
from rag_mm.data import sources

# 100 seconds of processor time for all tests.
pytestmark = pytest.mark.slow


def pixels(seed, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _rag_mm(*args, cwd):
    command = [sys.executable, "-m", "rag_mm", *args]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=900
    )


@pytest.fixture(scope="module")
def emu_run(tiny_run, tmp_path_factory):
    """emu:tiny with the first four stages of quickstart:tiny, a storyboard and a web page to train on."""
    folder = tmp_path_factory.mktemp("emu")
    documents = folder / "documents"
    documents.mkdir()
    for i in range(2):
        (documents / f"{i}.png").write_bytes(encode_png(pixels(i, 40)))
    board = {"frames": ["0.png", "1.png"], "seconds": 6, "subtitles": [[1, "first"], [4, "then"]]}
    page = {
        "text_list": ["One.", "Two."],
        "image_info": [{"image_name": "1.png", "matched_text_index": 1, "matched_sim": 0.5}],
    }
    lines = [{"id": "board", "storyboard": board}, {"id": "page", **page}]
    (documents / sources.CAPTIONS).write_text("\n".join(map(json.dumps, lines)))
    args = ["train", "--config=configs/emu.py:tiny", "--workdir=run", "--reuse", tiny_run.workdir]
    args += [
        "--config.emu_data.documents=documents",
        "--config.emu.sequences.mixture.documents=0.1",
    ]
    done = _rag_mm(*args, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run", done.stderr, args


@pytest.fixture(scope="module")
def session(emu_run):
    return rag_mm.load(str(emu_run[0]))


IMAGE = pixels(3, 32, 32)


def test_metrics_and_the_values_of_each_scene_are_kept(emu_run):
    run, log, _ = emu_run
    assert "neighbors: reused from" in log
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["emu_data"]["documents"] == 2
    assert {"text_ce", "image_r2", "participation_ratio"} <= set(metrics["emu"]["train"])
    figures, kept = (
        metrics["emu_figures"],
        json.loads((run / "emu_figures" / "per_document.json").read_text()),
    )
    for split in ("held_out", "seen"):
        for figure in ("r2", "random", "own", "same", "read_entity", "exact", "caption_nll"):
            for documents in ("none", "oracle", "retrieved", "wrong"):
                assert figures[split][figure][documents]["n"] == 16
                assert len(kept[split][documents][figure]) == 16
        assert figures[split]["random"]["shuffled"]["n"] == 16
        assert figures[split]["read_place"]["encoded"]["n"] == 16
    # All that there are: seven test classes have four test scenes each.
    assert figures["held_out_stories"]["story_nll"]["story"]["n"] == 28
    assert figures["held_out_clips"]["direction"]["shuffled_frames"]["n"] == 28
    assert figures["codes"]["participation_ratio"] > 1


def test_the_page_has_claims_pictures_and_curves(emu_run):
    html = (emu_run[0] / "emu.html").read_text()
    assert "<script" not in html and "has seen the held-out classes" in html
    # Twelve scenes: four rollouts of four images each, and the image whose caption is written.
    assert html.count("<img") == 12 * (4 * 4 + 1)
    assert html.count("<svg") == 5


def test_a_finished_run_is_left_alone(emu_run):
    run, _, args = emu_run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.npy")}
    again = _rag_mm(*args, cwd=run.parent)
    assert again.returncode == 0 and "emu_figures: already done" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.npy")}


def test_captions_come_with_their_likelihoods_and_the_documents_read(session):
    found = session.caption(IMAGE, docs=2, num=3, num_tokens=5)
    assert len(found.captions) == 3 and found.mean_log_probs == sorted(found.mean_log_probs)[::-1]
    scores = [each["score"] for each in found.neighbors]
    assert len(scores) == 2 and scores == sorted(scores)[::-1]
    # The nearest is read last; given by hand, best first, they give the same captions.
    documents = session.retrieve(IMAGE, 2)
    assert [document.id for document in documents[::-1]] == [each["id"] for each in found.neighbors]
    given = session.caption(IMAGE, documents=documents[::-1], num=3, num_tokens=5)
    assert given.captions == found.captions


def test_prompts_mix_texts_images_and_documents(session):
    picture = pixels(1, 48, 40)
    document = Document("d", (Text("a dog"), Image(picture)))
    spelled = session.imagine(["a dog", picture, "then", IMAGE, "it moves"])
    assert spelled.shape == (4, 64)
    np.testing.assert_allclose(
        session.imagine([document, "then", IMAGE, "it moves"]), spelled, atol=1e-5
    )
    assert np.abs(session.imagine([document, "then", IMAGE]) - spelled).max() > 1e-3
    assert isinstance(session.complete([IMAGE, "is", picture], num_tokens=4), str)


def test_an_image_is_nearest_to_its_own_codes(session):
    images = [pixels(i, 32, 32) for i in range(4)]
    assert session.rank(session.codes(images)[2], images)[0] == 2


def test_bad_requests_are_one_sentence(session):
    with pytest.raises(UserError, match="There is no image to caption"):
        session.caption([])
    with pytest.raises(UserError, match="put the text into a list"):
        session.imagine("a dog")
    with pytest.raises(UserError, match="the model takes at most 160"):
        session.imagine([IMAGE] * 40)
    for frames in ([IMAGE] * 9, np.stack([IMAGE] * 9)):
        with pytest.raises(UserError, match="There are 9 images; give at most 8"):
            session.caption(frames)
    with pytest.raises(UserError, match="docs is -1"):
        session.caption(IMAGE, docs=-1)


def test_the_command_captions_images_together(emu_run, tmp_path):
    run = emu_run[0]
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(encode_png(pixels(i, 32, 32)))
    images = ["--image", "0.png", "1.png"]
    done = _rag_mm("caption", f"--workdir={run}", *images, "--docs=1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["captions"]) == 1 and len(result["neighbors"]) == 1


def test_several_images_are_for_emu_alone(tiny_run, tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(encode_png(pixels(i, 32, 32)))
    images = ["--image", "0.png", "1.png"]
    done = _rag_mm("caption", f"--workdir={tiny_run.workdir}", *images, cwd=tmp_path)
    assert done.returncode == 2 and "captions one image at a time" in done.stderr


def test_the_tower_can_be_trained_with_the_rest(emu_run, tmp_path):
    """Files then hold pixels, and the model's own tower starts as the retriever's and moves."""
    args = ["train", "--config=configs/emu.py:tiny", f"--workdir={tmp_path / 'own'}"]
    args += ["--reuse", str(emu_run[0]), "--config.emu_data.pictures=pixels"]
    args += ["--config.emu.targets.standardises_tokens=False"]
    args += ["--config.emu.loop.num_steps=4", "--config.emu.loop.log_every=2"]
    args += ["--config.emu.loop.checkpoint_every=4"]
    done = _rag_mm(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    own = rag_mm.load(str(tmp_path / "own"))
    before = own.encoder.model.params["vision"]["patches"]["kernel"]
    after = own.emu.model.params["tower"]["patches"]["kernel"]
    change = np.abs(np.asarray(before) - np.asarray(after)).max()
    assert 0 < change < 0.01
    assert own.rank(own.codes([pixels(0), pixels(1)])[1], [pixels(0), pixels(1)]) == [1, 0]
