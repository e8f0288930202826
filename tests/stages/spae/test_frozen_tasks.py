"""Captions, answers and images by a language model that counts, and by one that does not."""

import types

import numpy as np
import pytest
import stand_in_words

from rag_mm.core.document_types import Document, Image, Text
from rag_mm.core.errors import UserError
from rag_mm.frozen_lm import denoising
from rag_mm.stages.spae import frozen_tasks

OPENED = stand_in_words.WordedImages()
PIXELS = np.random.default_rng(0).integers(256, size=(12, 20, 3), dtype=np.uint8)


def documents(*texts: str) -> list[Document]:
    """Documents of rising brightness, each behind one without a picture."""
    made = []
    for i, text in enumerate(texts):
        made.append(Document(f"text{i}", (Text("no picture"),)))
        pixels = np.full((9, 9, 3), 40 * i, np.uint8)
        made.append(Document(f"image{i}", (Text(text), Image(pixels))))
    return made


@pytest.mark.parametrize("task", denoising.CONDITIONS)
def test_whoever_counts_is_as_good_as_the_vote(task):
    made = frozen_tasks.complete_image(OPENED, PIXELS, task, stand_in_words.MajorityReader())
    figures = made.figures
    assert figures["lm"] == figures["majority"] and figures["valid"] == 1.0
    assert figures["majority"]["all"] > 0.9
    np.testing.assert_array_equal(made.by_lm, made.by_majority)
    assert made.given.shape == made.wanted.shape == made.by_lm.shape == (8, 8, 3)
    has_level1 = task not in ("inpaint", "outpaint") or figures["lm"]["level1"] is not None
    assert has_level1 or task == "outpaint"  # The only code of level 1 lies in the middle.


def test_nonsense_leaves_what_was_given():
    mute = types.SimpleNamespace(
        generate=lambda prompts, num_tokens: types.SimpleNamespace(texts=["42"] * len(prompts))
    )
    figures = frozen_tasks.complete_image(OPENED, PIXELS, "shift", mute).figures
    assert figures["lm"] == figures["given"] and figures["valid"] == 0.0


def test_a_full_grid_is_never_spared_by_the_noise():
    figures = frozen_tasks.complete_image(OPENED, PIXELS, "shift", None, num_examples=1).figures
    assert figures["majority"]["level2"] == 1 > figures["majority"]["level3"]


def test_without_a_language_model_there_is_the_vote():
    made = frozen_tasks.complete_image(OPENED, PIXELS, "deblur", None, num_examples=3)
    assert made.by_lm is None and set(made.figures) == {"majority", "given", "valid"}


def test_a_caption_is_drawn_after_examples():
    reader = stand_in_words.MajorityReader()
    shown = documents("a cat", "a dog", "a fox")
    made = frozen_tasks.draw_caption(OPENED, "a\ncow", shown, reader, num_examples=3)
    assert "C: a cat\n" in reader.prompts[0] and reader.prompts[0].endswith("C: a cow\nA:")
    np.testing.assert_array_equal(made.by_lm, made.by_majority)
    assert made.given is None and made.figures == {"valid": 1.0}
    with pytest.raises(UserError, match="Only 3 documents have a text and a picture; give 4"):
        frozen_tasks.draw_caption(OPENED, "a cow", shown, None, num_examples=4)
    with pytest.raises(UserError, match="caption is empty"):
        frozen_tasks.draw_caption(OPENED, " ", shown, None)


def test_captions_and_answers_are_asked_for_in_words():
    prompts = []

    def generate(asked, num_tokens):
        prompts.extend(asked)
        return types.SimpleNamespace(texts=[" black\nQ: next"])

    lm = types.SimpleNamespace(generate=generate)
    pixels = np.zeros((4, 4, 3), np.uint8)
    shown = documents("night", "dusk")
    options = dict(num_examples=2, levels=1)
    assert frozen_tasks.describe_image(OPENED, pixels, shown, lm, **options) == "black"
    assert prompts[-1].endswith("Q: black\nA: night\nQ: ash\nA: dusk\nQ: black\nA:")
    shown = documents("Which? Is it bright? no", "Is it bright? rather")
    options["question"] = "Is it dark?"
    assert frozen_tasks.describe_image(OPENED, pixels, shown, lm, **options) == "black"
    assert prompts[-1].endswith(
        "C: black\nQ: Which? Is it bright?\nA: no\nC: ash\nQ: Is it bright?\nA: rather\n"
        "C: black\nQ: Is it dark?\nA:"
    )
    with pytest.raises(UserError, match="document image0 is no question"):
        frozen_tasks.describe_image(OPENED, pixels, documents("night", "dusk"), lm, **options)
    with pytest.raises(UserError, match="levels is 4; this image tokenizer has 1 to 3"):
        frozen_tasks.describe_image(OPENED, pixels, shown, lm, levels=4)


@pytest.mark.parametrize(
    ("task", "count", "message"),
    [("sharpen", 10, "task 'sharpen' is unknown"), ("shift", 11, "give 1 to 10")],
)
def test_what_cannot_be_done_is_refused(task, count, message):
    with pytest.raises(UserError, match=message):
        frozen_tasks.complete_image(OPENED, PIXELS, task, None, num_examples=count)
