"""The chain of configs/spae.py:tiny, and what its words are good for elsewhere."""

import json
import subprocess
import sys

import numpy as np
import pytest

from rag_mm.core import files, run_folder
from rag_mm.stages import chain, chain_config
from rag_mm.stages.shared import frozen, given_models, train_tokenizer, world_config
from rag_mm.stages.spae import build_codebook, rank_words, word_images

# 90 seconds of processor time for all tests.
pytestmark = pytest.mark.slow


def _rag_mm(*args, cwd):
    command = [sys.executable, "-m", "rag_mm", *args]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=900
    )


@pytest.fixture(scope="module")
def words_run(tiny_run, tmp_path_factory):
    """spae:tiny, with the tokenizer and the retriever of quickstart:tiny."""
    folder = tmp_path_factory.mktemp("spae")
    args = ["train", "--config=configs/spae.py:tiny", "--workdir=run", "--reuse", tiny_run.workdir]
    done = _rag_mm(*args, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run", done.stderr


def _spae(run):
    return json.loads((run / "metrics.json").read_text())["spae"]


def test_stages_of_the_quickstart_are_reused(words_run):
    assert "tokenizer: reused from" in words_run[1] and "retriever: reused from" in words_run[1]


def test_the_frozen_codebook_ends_as_it_began(words_run):
    run, _ = words_run
    table = build_codebook.load(run / "language_codebook").table
    trained = frozen.FrozenTokenizer(run / "spae" / "frozen").model.params["codebook"]
    np.testing.assert_array_equal(np.asarray(trained), table)
    assert _spae(run)["codebook_digest"] == build_codebook.digest_of(table)


def test_metrics_are_given_by_level_and_by_kind_of_features(words_run):
    metrics = _spae(words_run[0])
    assert {f"level{n}" for n in range(1, 6)} <= set(metrics)
    assert set(metrics["words"]["level1"]) == {
        "named",
        "relative_score_all_names",
        "relative_score_seen_names",
        "relative_score_templates",
    }
    assert set(metrics["overlap"]) == {"first5", "first21"}
    log = (words_run[0] / "spae" / "log.jsonl").read_text().splitlines()
    figures = {"latent_error_level5", "latent_norm_level5", "perplexity_level1", "semantic_loss"}
    assert figures <= set(json.loads(log[-1]))


def test_the_first_word_of_each_pool_has_the_best_relative_score(words_run):
    run, _ = words_run
    pools = rank_words.load(run / "word_pools")
    opened = word_images.load(run)
    world = world_config.EmojiWorld(class_share=0.05, seed=0)
    source = world.scenes("train", *world_config.SEEN)
    scores = opened.relative_scores(world_config.images(source, np.arange(4)))
    np.testing.assert_allclose(scores.max(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(scores.argmax(axis=1), pools.words[:4, 0])
    sizes = [(scores >= low).sum(axis=1) for low in (0.98, 0.95, 0.90)]
    np.testing.assert_array_equal(np.stack(sizes, axis=1), pools.sizes[:4])


def test_words_of_any_first_levels_are_decoded(words_run):
    opened = word_images.load(words_run[0])
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    codes = opened.tokenizer.encode(images)
    assert codes.shape == (2, 149)
    assert all(word.isascii() and word.islower() for word in opened.words)
    whole = opened.tokenizer.decode(codes)
    for levels in (1, 3, 5):
        decoded = opened.tokenizer.decode(codes, levels)
        assert decoded.shape == (2, 32, 32, 3)
        assert (decoded == whole).all() == (levels == 5)


def test_the_page_says_first_what_the_retriever_has_seen(words_run):
    html = (words_run[0] / "spae.html").read_text()
    lead = html.split("<p>")[1]
    assert lead.startswith(
        "The retriever, which ranks words for images, has seen the held-out classes"
    )
    assert html.count("<figure>") == 4


def test_a_finished_run_is_left_alone(words_run):
    run, _ = words_run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.npy")}
    again = _rag_mm("train", "--config=configs/spae.py:tiny", "--workdir=run", cwd=run.parent)
    assert again.returncode == 0 and "spae: already done" in again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.npy")}


def test_a_decoder_can_be_given_word_codes(words_run, tmp_path):
    """The image tokenizer of a chain may be the autoencoder, whose guide then travels with it."""
    run, _ = words_run
    done = _rag_mm(
        "train",
        "--config=configs/quickstart.py:tiny",
        "--stage=tokenizer",
        f"--workdir={tmp_path / 'decoder'}",
        f"--config.tokenizer.folder={run / 'spae'}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    copied = train_tokenizer.load_tokenizer(tmp_path / "decoder")
    original = frozen.FrozenTokenizer(given_models.find_model(run, "spae"))
    assert copied.words == original.words and copied.guide is not None
    images = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(copied.encode(images), original.encode(images))
    assert run_folder.open_run(tmp_path / "decoder").finished_stage("tokenizer")


def test_words_without_guidance_need_the_retriever_of_their_codebook_alone(words_run, tmp_path):
    run, _ = words_run
    stages = ("tokenizer", "retriever", "language_codebook", "spae")
    changes = {"stages": repr(stages), "spae.model.guide_dim": "0", "spae.semantic.alpha": "0.0"}
    config = chain_config.load("configs/spae.py:tiny", changes)
    for stage in stages[:-1]:
        made = chain.run_chain(config, tmp_path / "run", only=stage, reuse_from=[run])
    files.discard(made.stage_dir("retriever"))
    chain.run_chain(config, tmp_path / "run", only="spae")
    assert set(made.manifest("spae").inputs) == {"language_codebook"}
    assert set(made.metrics["spae"]["words"]) == {f"level{n}" for n in range(1, 6)}
    opened = word_images.load(tmp_path / "run")
    assert opened.retriever.fingerprint == word_images.load(run).retriever.fingerprint


def test_a_decoder_trained_here_is_asked_about_the_words(words_run, tiny_run):
    run, _ = words_run
    done = _rag_mm(
        *(
            "eval",
            "--suite=fewshot",
            "--images=scenes:easy/test/test",
            f"--workdir={run}",
            "--json",
        ),
        *("--ways=2", "--episodes=3", "--top=1", "--scoring=both", f"--lm={tiny_run.workdir}"),
        cwd=run.parent,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert {"overlap", "log_p", "calibrated", "greedy"} == set(found["per_episode"])
    assert 0 < found["one_token_words"] < 1


def test_a_learned_codebook_is_trained_by_the_same_stage(tmp_path):
    overrides = {
        "stages": "('spae',)",
        "spae.model.codebook": "learned",
        "spae.model.levels": "(4,8)",
        "spae.model.guide_dim": 0,
        "spae.semantic.alpha": 0.0,
    }
    options = [f"--config.{key}={value}" for key, value in overrides.items()]
    done = _rag_mm(
        "train", "--config=configs/spae.py:tiny", "--workdir=run", *options, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"psnr", "level1", "level2"} <= set(_spae(tmp_path / "run"))
    assert "The retriever" not in (tmp_path / "run" / "spae.html").read_text()
    images = "--images=scenes:easy/test/test"
    refused = _rag_mm("eval", "--suite=fewshot", images, "--workdir=run", cwd=tmp_path)
    assert refused.returncode == 2 and "codes are no words" in refused.stderr
