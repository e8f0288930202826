"""Imported checkpoints match transformers: compared with its stored outputs, so torch is not needed."""

import pathlib

import numpy as np
import pytest
import tiny

import rag_mm
from rag_mm.api import importing
from rag_mm.ops import images as image_ops

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def open_tiny(tmp_path_factory):
    """name -> (the imported run from `rag_mm.load`, transformers' outputs)."""
    opened = {}

    def open_one(name):
        if name not in opened:
            place = tmp_path_factory.mktemp(name)
            folder = tiny.write(place / "theirs", name, max_bytes=20_000)
            family = tiny.CHECKPOINTS[name][0]
            importing.import_checkpoint(family, folder, place / "run")
            with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as golden:
                opened[name] = rag_mm.load(str(place / "run")), dict(golden)
        return opened[name]

    return open_one


@pytest.mark.parametrize("name", tiny.LANGUAGE)
def test_logits(open_tiny, name):
    model, golden = open_tiny(name)
    logits = model.logits(tiny.tokens((2, 17)))
    # transformers masks image tokens in the model, ours only while sampling.
    is_allowed = golden["logits"] > np.finfo(np.float32).min
    np.testing.assert_allclose(logits[is_allowed], golden["logits"][is_allowed], atol=1e-4)
    assert is_allowed.all() == (name not in tiny.CHAMELEONS)


# Compiling a loop takes seconds; the other checkpoints are in test_public_parity.py.
@pytest.mark.parametrize("name", ["llama_3", "chameleon_swin"])
def test_greedy_tokens_of_left_padded_prompts(open_tiny, name):
    model, golden = open_tiny(name)
    found = model.generate(tiny.PROMPTS, num_tokens=tiny.NUM_TOKENS)
    assert found.tokens == golden["written"].tolist() and found.texts is None
    assert len(np.unique(golden["written"])) > 4  # It does not just repeat itself.


def test_a_prompt_alone_is_continued_as_in_a_batch(open_tiny):
    model, golden = open_tiny("llama_3")
    alone = model.generate(tiny.PROMPTS[:1], num_tokens=tiny.NUM_TOKENS)
    assert alone.tokens == golden["written"][:1].tolist()


@pytest.mark.parametrize("name", tiny.CHAMELEONS)
def test_image_tokens(open_tiny, name):
    model, golden = open_tiny(name)
    pictures = tiny.make_images(2, 16)
    embed = model.vq.compile("embed")
    np.testing.assert_allclose(embed(image_ops.to_float(pictures)), golden["latents"], atol=1e-4)
    found = model.encode_image(list(pictures))
    np.testing.assert_array_equal(found, golden["image_tokens"])
    assert len(np.unique(found)) > 4 and set(found.ravel()) <= set(model.model.code_tokens)


@pytest.mark.parametrize("name", tiny.CLIPS)
def test_clip_features(open_tiny, name):
    model, golden = open_tiny(name)
    images = model.encode_image(list(tiny.make_images(4, 12)))
    texts = np.asarray(model.retriever._encode_text(tiny.clip_tokens(name)))
    np.testing.assert_allclose(images, golden["images"], atol=1e-4)
    np.testing.assert_allclose(texts, golden["texts"], atol=1e-4)


@pytest.mark.parametrize("name", tiny.SIGLIPS)
def test_siglip_features(open_tiny, name):
    """Square images and, of NaFlex, wide and high ones in one call; and the sigmoid of scale and bias."""
    model, golden = open_tiny(name)
    batches = tiny.siglip_images(name)
    images = model.encode_image([image for batch in batches for image in batch])
    wanted = np.concatenate([golden[f"images_{i}"] for i in range(len(batches))])
    np.testing.assert_allclose(images, wanted, atol=1e-4)
    texts = np.asarray(model.retriever._encode_text(tiny.tokens((4, 7), seed=2)))
    np.testing.assert_allclose(texts, golden["texts"], atol=1e-4)
    matches = np.asarray(model.retriever.model.compile("match")(images[:4], texts))
    np.testing.assert_allclose(matches, golden["match"], atol=1e-4)
    assert np.ptp(matches) > 0.05


def test_the_two_pooling_rules_differ_on_the_golden_inputs(open_tiny):
    """Otherwise the golden files would accept either rule."""
    encode = [open_tiny(name)[0].retriever._encode_text for name in ("clip", "clip_legacy")]
    first_end, highest_id = (np.asarray(e(tiny.clip_tokens("clip_legacy"))) for e in encode)
    np.testing.assert_allclose(first_end[[0, 3]], highest_id[[0, 3]], atol=1e-5)
    assert np.abs(first_end[1:3] - highest_id[1:3]).max() > 0.01
