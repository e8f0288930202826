"""Parts of training sequences: frames of videos, windows of documents, images with their texts."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rag_mm.core.document_types import Document, Image, Text, Video
from rag_mm.data import interleaved
from rag_mm.data.interleaved import Mark


def test_frames_are_those_of_emus_picker():
    # seg = (F - 1) / 8, start = int(seg / 2), start + round(i * seg): by hand for 41 and 9 frames.
    assert interleaved.frame_numbers(41) == [2, 7, 12, 17, 22, 27, 32, 37]
    assert interleaved.frame_numbers(9) == list(range(8))
    assert interleaved.frame_numbers(1) == [0] * 8


def test_a_document_becomes_texts_and_numbers_of_its_pictures():
    pixels = np.arange(11, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    segments = (Text("a"), Image(pixels[0]), Text("b"), Video(pixels[1:10], 8.0), Image(pixels[10]))
    seen = {}

    def number(i, given):
        seen[i] = int(given[0, 0, 0])
        return 100 + i

    parts = interleaved.parts_of(Document("d", segments), number)
    assert parts == ("a", 100, "b", *range(101, 109), 110)
    # The picture of each number is the document's own of that place.
    assert seen == {i: i for i in (*range(9), 10)}


def test_images_come_first_in_their_order():
    assert interleaved.images_first(("a", 1, "b", 0)) == (1, 0, "a", "b")


def test_a_dialogue_says_who_speaks_and_ends_each_answer():
    user, assistant, end = Mark.USER, Mark.ASSISTANT, Mark.END
    turns = [((7, "what?"), "a dog"), (("where?",), None)]
    found = interleaved.dialogue(turns, "look")
    first = ("look", user, 7, "what?", assistant, "a dog", end)
    assert found == (*first, user, "where?", assistant)


PARTS = st.lists(st.one_of(st.text("x", min_size=1, max_size=9), st.integers(0, 9)), max_size=12)


@given(PARTS, st.integers(0, 2**32), st.integers(1, 30), st.integers(0, 4))
def test_a_window_is_a_run_that_fits_and_cannot_be_longer(parts, seed, max_len, max_images):
    parts = tuple(parts)
    size = lambda part: 3 if isinstance(part, int) else len(part)
    found = interleaved.window(parts, size, max_len, max_images, np.random.default_rng(seed))
    images = sum(isinstance(part, int) for part in found)
    assert sum(map(size, found)) <= max_len and images <= max_images
    if not found:
        alone = [part for part in parts if size(part) <= max_len]
        assert not alone or (max_images == 0 and all(isinstance(part, int) for part in alone))
        return
    # Somewhere it stands as it is, and there the part behind it does not fit.
    places = [i for i in range(len(parts)) if parts[i : i + len(found)] == found]
    assert places
    longer = [found + parts[i + len(found) : i + len(found) + 1] for i in places]
    assert any(
        len(each) == len(found)
        or sum(map(size, each)) > max_len
        or sum(isinstance(part, int) for part in each) > max_images
        for each in longer
    )


def test_every_window_of_a_document_can_be_drawn():
    parts = tuple("abcdefg")
    drawn = {
        interleaved.window(parts, len, 3, 0, np.random.default_rng(seed)) for seed in range(100)
    }
    assert drawn == {parts[i : i + 3] for i in range(5)}


def test_sampled_pairs_keep_the_order_and_the_text_after_each_image():
    parts = ("x", 0, "a", 1, 2, "b", 3, "c")
    rng = np.random.default_rng(0)
    assert interleaved.sampled_pairs(parts, 9, rng) == (0, "a", 2, "b", 3, "c")
    drawn = {interleaved.sampled_pairs(parts, 2, rng) for _ in range(50)}
    assert drawn == {(0, "a", 2, "b"), (0, "a", 3, "c"), (2, "b", 3, "c")}
