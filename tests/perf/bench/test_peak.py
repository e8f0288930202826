"""One device against its published peaks, at the smallest size: the figures mean what they say."""

import json

import jax
import numpy as np
import pytest

from rag_mm.cli import main
from rag_mm.core.errors import UserError
from rag_mm.perf import chips, flops
from rag_mm.perf.bench import peak
from rag_mm.perf.plan import decoder_programs, traffic

TRAIN = ("train", "--against=peak", "--size=tiny", "--steps=2", "--rounds=1", "--batch=1")
DECODE = ("decode", "--against=peak", "--size=tiny", "--rounds=1", "--length=16", "--new=4")


def run(capsys, *words):
    assert main.main(["bench", *words, "--json"]) == 0
    cases = json.loads(capsys.readouterr().out)
    assert (
        set(cases) == {"tiny"} and cases["tiny"]["machine"] and "jax" in cases["tiny"]["versions"]
    )
    return cases["tiny"]


@pytest.fixture
def published(monkeypatch):
    """Peaks for the device of the tests."""
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(chips.DEVICE_FLOPS, kind, 1e12)
    monkeypatch.setitem(chips.DEVICE_BANDWIDTH, kind, 1e10)


def test_a_step_is_counted_in_model_flops(capsys, published):
    case = run(capsys, *TRAIN)
    per_token = flops.train_flops(peak.SIZES["tiny"].model.decoder, 128)
    assert case["ours"] == pytest.approx(per_token * case["tokens_per_second"])
    assert case["tokens_per_second"] == pytest.approx(128 / case["step_seconds"])
    assert case["peer"] == 1e12 and case["ratio"] == pytest.approx(case["ours"] / 1e12)
    assert (case["unit"], case["remat"], case["attention"]) == ("FLOP/s", "none", "cpu")
    np.testing.assert_allclose(case["loss"], np.log(512), rtol=0.01)


def test_remat_and_chunks_change_the_step_and_not_its_loss(capsys):
    loss = run(capsys, *TRAIN)["loss"]
    case = run(capsys, *TRAIN, "--remat=full", "--loss-chunks=1")
    assert (case["remat"], case["loss_chunks"]) == ("full", 1)
    np.testing.assert_allclose(case["loss"], loss, rtol=1e-3)


def test_a_token_is_counted_in_bytes_that_it_must_read(capsys, published):
    case = run(capsys, *DECODE)
    per_token = traffic.decode_bytes(peak.SIZES["tiny"].model.decoder, 14)
    assert case["bytes_per_token"] == per_token
    assert case["ours"] == pytest.approx(per_token * case["tokens_per_second"])
    assert case["peer"] == 1e10 and case["ratio"] == pytest.approx(case["ours"] / 1e10)


def test_bytes_of_a_token_are_weights_and_the_cache_in_two_bytes():
    decoder = peak.SIZES["tiny"].model.decoder
    weights = 2 * 12 * 64**2 + 512 * 64
    assert traffic.decode_bytes(decoder, 0) == 2 * weights
    # Keys and values of two layers, 64 wide.
    assert (
        traffic.decode_bytes(decoder, 10) - traffic.decode_bytes(decoder, 0) == 2 * 10 * 2 * 2 * 64
    )


def test_sizes_are_what_they_are_called():
    """In billions; the published peaks stand for the same devices."""
    sizes = {
        name: decoder_programs.count_params(size.model) / 1e9 for name, size in peak.SIZES.items()
    }
    assert round(sizes["1.3b"], 2) == 1.35 and round(sizes["7b"], 1) == 6.7
    for name in ("1.3b", "7b"):
        decoder = peak.SIZES[name].model.decoder
        assert decoder.max_seq_len == 4_096 and decoder.dtype == "bfloat16"
        assert decoder.block.head_dim == 128  # what cuDNN takes at most
    assert set(chips.DEVICE_BANDWIDTH) == set(chips.DEVICE_FLOPS)


def test_without_a_published_peak_there_is_no_ratio(capsys):
    for words in (TRAIN, DECODE):
        case = run(capsys, *words)
        assert case["peer"] is None and case["ratio"] is None and case["ours"] > 0
    assert main.main(["bench", *DECODE]) == 0
    assert "none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "--against=peak", "--size=7b"), "no published peak"),
        (("decode", "--against=peak"), "no published peak"),
        (("train", "--against=peak", "--size=2b"), "--size"),
        (("train", "--against=peak", "--length=128"), "--length does not apply"),
        ((*TRAIN, "--remat=some"), "--remat"),
        ((*TRAIN, "--loss-chunks=0"), "--loss-chunks is 0"),
        ((*DECODE, "--new=16"), "--new=16"),
        ((*DECODE, "--length=129"), "at most 128"),
    ],
    ids=str,
)
def test_mistakes_are_one_sentence(capsys, words, said):
    assert main.main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_what_does_not_fit_says_what_would(monkeypatch):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(peak.ours, "make_train_step", refuse)
    with pytest.raises(UserError, match="--remat=full"):
        peak.train("tiny")
    monkeypatch.setattr(peak.ours, "make_generate", refuse)
    with pytest.raises(UserError, match="smaller --length"):
        peak.decode("tiny")


def test_rows_are_one_segment_without_a_mask(monkeypatch):
    """So cuDNN's kernel is the causal one; another batch would store a mask a layer."""
    seen = []
    real = peak.ours.make_train_step

    def spy(*args):
        step = real(*args)
        return lambda batch, *rest: seen.append(set(batch)) or step(batch, *rest)

    monkeypatch.setattr(peak.ours, "make_train_step", spy)
    peak.train("tiny", batch_size=1, num_steps=1, num_rounds=1)
    assert seen and all("segment_ids" not in names for names in seen)
