"""Words that fit each image: ranked in chunks, in any number of goes."""

import itertools

import numpy as np
import pytest
from etils import epath

from rag_mm.core import run_folder
from rag_mm.models.spae import semantic
from rag_mm.stages.shared import train_retriever, world_config
from rag_mm.stages.spae import build_codebook, rank_words

WORLD = world_config.EmojiWorld(class_share=0.02, seed=0)
CONFIG = rank_words.WordPoolsStageConfig(0, WORLD, thresholds=(0.9, 0.5), max_words=6)


class _Encoder:
    """The mean color of an image; `left` more calls succeed."""

    def __init__(self, left=1000):
        self.left = left

    def encode_image(self, pixels):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return (pixels.mean(axis=(1, 2)) / 255).astype(np.float32)


def _run(folder, encoder, monkeypatch, max_images=64):
    """The stage with a codebook of 40 words, and the files that it left."""
    rng = np.random.default_rng(0)
    features = {"all_names": rng.normal(size=(40, 3)).astype(np.float32)}
    features["all_names"][30:] = features["all_names"][:10]  # Words of equal scores,
    features["all_names"][20:25] = 0  # and without any.
    codebook = build_codebook.LanguageCodebook(("word",) * 40, np.eye(40), features)
    monkeypatch.setattr(build_codebook, "load", lambda folder: codebook)
    monkeypatch.setattr(run_folder.Run, "finished_stage", lambda run, stage: folder / stage)
    monkeypatch.setattr(train_retriever, "load_encoder", lambda workdir: encoder)
    monkeypatch.setattr(rank_words, "_MAX_IMAGES", max_images)
    stage_dir = epath.Path(folder) / "word_pools"
    metrics = rank_words.run(CONFIG, run_folder.Run(epath.Path(folder)), stage_dir)
    return metrics, {path.name: path.read_bytes() for path in stage_dir.iterdir()}


def test_pools_are_those_of_sorting_all_words(tmp_path, monkeypatch):
    metrics, _ = _run(tmp_path, _Encoder(), monkeypatch)
    pools = rank_words.load(epath.Path(tmp_path) / "word_pools")
    features = build_codebook.load(None).features["all_names"]
    scores = semantic.relative_scores(pools.embeddings, features)
    sizes = np.stack([(scores >= low).sum(axis=1) for low in CONFIG.thresholds], axis=1)
    assert sizes.min() >= 1 and sizes.max() > 6
    np.testing.assert_array_equal(pools.sizes, np.minimum(sizes, 6))
    for own, words in zip(scores, pools.words, strict=True):
        np.testing.assert_allclose(own[words], np.sort(own)[::-1][:6], atol=0)
        # Of equal words the first comes first.
        assert all(a < b for a, b in itertools.pairwise(words) if own[a] == own[b])
    assert metrics["capped"] == np.mean(sizes.max(axis=1) > 6)
    assert metrics["median_size"]["level1"] == np.median(np.minimum(sizes, 6)[:, 0])


def test_an_interrupted_stage_goes_on_to_the_same_files(tmp_path, monkeypatch):
    whole = _run(tmp_path / "whole", _Encoder(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "cut", _Encoder(left=2), monkeypatch)
    rest = _Encoder()
    resumed = _run(tmp_path / "cut", rest, monkeypatch)
    num_chunks = -(-len(WORLD.scenes("train", *world_config.SEEN)) // 64)
    assert num_chunks > 3 and 1000 - rest.left == num_chunks - 2
    assert resumed == whole
    assert set(whole[1]) == {rank_words.EMBEDDINGS, rank_words.POOL_WORDS, rank_words.POOL_SIZES}
    monkeypatch.setattr(rank_words, "_MAX_SCORES", 40 * 16)  # 16 images at once.
    assert _run(tmp_path / "small", _Encoder(), monkeypatch) == whole
