"""The stage `tokenizer`: figures of each level and of each image size."""

import dataclasses
import json
import types

import numpy as np
import pytest
import stand_in_words
from etils import epath

from rag_mm.core import run_folder
from rag_mm.core.errors import UserError
from rag_mm.stages import chain_config
from rag_mm.stages.shared import tokenizer_figures, train_tokenizer

TINY = {
    "world.class_share": 0.02,
    "tokenizer.model.codebook_size": 64,
    "tokenizer.loop.num_steps": 4,
    "tokenizer.loop.log_every": 2,
    "tokenizer.loop.checkpoint_every": 4,
    "tokenizer.num_init_images": 32,
    "tokenizer.num_eval": 4,
    "tokenizer.text.vocab_size": 300,
}


def _config(levels, **changes):
    values = chain_config.load(
        "configs/quickstart.py:tiny", TINY | {"tokenizer.model.levels": levels}
    )
    config = chain_config.stage_configs(values)["tokenizer"]
    return dataclasses.replace(config, **changes)


def _train(config, folder):
    """The stage's metrics and its image tokenizer."""
    stage_dir = epath.Path(folder) / "tokenizer"
    stage_dir.mkdir()
    metrics = train_tokenizer.run(config, run_folder.Run(epath.Path(folder)), stage_dir)
    return metrics, train_tokenizer.load_tokenizer(stage_dir / train_tokenizer.FOLDER), stage_dir


def test_levels_and_image_sizes_are_measured_each(tmp_path):
    metrics, tokenizer, stage_dir = _train(_config((2, 4, 8), image_sizes=(32, 16)), tmp_path)
    assert tokenizer.grids == ((2, 2), (4, 4), (8, 8))
    assert tokenizer.vocabulary.image_sizes == (32, 16)
    levels = [metrics[f"level{number}"] for number in (1, 2, 3)]
    assert levels[2]["psnr"] == metrics["psnr"] > levels[1]["psnr"] > levels[0]["psnr"]
    for figures in levels:
        assert 1 <= figures["perplexity"] <= 64 * figures["code_usage"]
    assert metrics["code_usage"] >= max(figures["code_usage"] for figures in levels)
    others = {name for name in metrics if name.startswith(("level", "size"))}
    assert others == {"level1", "level2", "level3", "size16"}
    assert metrics["size16"].keys() == {"psnr"} and metrics["size16"]["psnr"] != metrics["psnr"]
    last = json.loads((stage_dir / "log.jsonl").read_text().splitlines()[-1])
    for name in ("code_usage", "perplexity", "latent_norm"):
        assert {f"{name}_level{number}" for number in (1, 2, 3)} < last.keys()
        assert last[f"{name}_level1"] > 0
    assert last["perplexity"] >= last["perplexity_level1"]


def test_one_level_has_no_figures_by_level(tiny_run):
    metrics = json.loads((tiny_run.workdir / "metrics.json").read_text())["tokenizer"]
    assert set(metrics) == {
        "psnr",
        "sharpness",
        "code_usage",
        "perplexity",
        "scorer_on_originals",
        "scorer_ceiling",
    }
    lines = (tiny_run.workdir / "tokenizer" / "log.jsonl").read_text().splitlines()
    assert lines and not any("level" in line for line in lines)


def test_image_sizes_are_checked():
    assert _config((4, 8), image_sizes=(32, 16)).image_sizes == (32, 16)
    with pytest.raises(ValueError, match="must begin with the world's image size, 32"):
        _config((8,), image_sizes=(16, 32))
    with pytest.raises(UserError, match="12 x 12 pixels .* multiples of 8"):
        _config((4, 8), image_sizes=(32, 12))


def test_frequencies_by_level_add_up_to_those_of_all_codes():
    rng = np.random.default_rng(0)
    one, two = rng.random((2, 64)) * (rng.random((2, 64)) < 0.5)
    derived = tokenizer_figures.derive(
        {
            "squared_error": np.float32(0.01),
            "code_frequencies": np.stack([one, two]),
            "latent_errors": np.array([0.5, 0.1]),
            "latent_square": np.float32(2.0),
            "target_squares": np.array([4.0, 0.25]),
            "codebook_square": np.float32(1.0),
        }
    )
    assert derived["psnr"] == pytest.approx(20.0)
    assert derived["code_usage"] == np.mean((one + two) > 0)
    assert derived["code_usage_level1"] == np.mean(one > 0) < derived["code_usage"]
    assert derived["code_usage_level2"] == np.mean(two > 0)
    assert derived["latent_error_level1"] == 0.25 and derived["latent_error_level2"] == 0.05
    assert derived["latent_norm_level1"] == 2.0 and derived["latent_norm_level2"] == 0.5


class _Pictures(list):
    """Images of no world, as `world_config.SplitDocuments` gives them."""

    image = list.__getitem__


def test_every_prefix_is_decoded_once():
    pixels = np.random.default_rng(0).integers(256, size=(5, 8, 8, 3), dtype=np.uint8)
    world = types.SimpleNamespace(scenes=lambda role, *splits: _Pictures(pixels))
    tokenizer, levels = stand_in_words.BrightnessTokenizer(), []
    decode = tokenizer.decode
    tokenizer.decode = lambda codes, number: levels.append(number) or decode(codes, number)
    test = tokenizer_figures.reconstruct(world, tokenizer, 5, seed=0)
    metrics = tokenizer_figures.measure(tokenizer, test)
    assert levels == [1, 2, 3]
    for number in levels:
        errors = (decode(test.codes, number) / 255 - pixels / 255) ** 2
        each = -10 * np.log10(errors.mean(axis=(1, 2, 3)))
        np.testing.assert_allclose(test.psnr[number - 1], each)
        assert metrics[f"level{number}"]["psnr"] == pytest.approx(-10 * np.log10(errors.mean()))
    assert metrics["psnr"] == metrics["level3"]["psnr"]


def test_sharpness_is_the_strength_of_edges_and_not_of_brightness():
    stripes = np.zeros((1, 8, 8, 3), np.uint8)
    stripes[:, :, ::2] = 200
    decoded = np.concatenate([stripes, stripes // 2, 0 * stripes + 100])
    test = tokenizer_figures.TestImages(
        None, None, np.repeat(stripes, 3, 0), None, np.zeros((1, 3)), decoded
    )
    np.testing.assert_allclose(test.sharpness, [1, 0.5, 0])
