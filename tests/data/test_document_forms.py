"""Storyboards and web pages in a folder become documents of segments; bad ones are named."""

import json

import hostile
import numpy as np
import pytest

from rag_mm.core.document_types import Image, Text
from rag_mm.data import captions, open_documents, sources, storyboards, web_pages


def test_what_is_said_before_a_frame_stands_before_it_and_the_rest_is_last():
    # Three frames in 31 s: at 0, 10 and 20 s. Words that begin with a frame come after it.
    spoken = [(12.0, "d"), (0.0, "a"), (9.9, " c "), (4.0, "b"), (25.0, "e"), (31.0, "f")]
    assert storyboards.merge(["0", "1", "2"], 31.0, spoken) == [
        {"image": "0"},
        {"text": "a b c"},
        {"image": "1"},
        {"text": "d"},
        {"image": "2"},
        {"text": "e f"},
    ]


def test_a_storyboard_may_be_silent_or_short():
    assert storyboards.merge(["0", "1"], 0.2, []) == [{"image": "0"}, {"image": "1"}]
    # An interval is at least a second.
    assert storyboards.merge(["0", "1"], 0.2, [(0.5, "a"), (2.0, "b")]) == [
        {"image": "0"},
        {"text": "a"},
        {"image": "1"},
        {"text": "b"},
    ]


PAGE = {
    "text_list": ["One.", "Two.", "Three."],
    "image_info": [
        {"image_name": "b.png", "matched_text_index": 2, "matched_sim": 0.40},
        {"image_name": "low.png", "matched_text_index": 1, "matched_sim": 0.3199},
        {"image_name": "a.png", "matched_text_index": 0, "matched_sim": 0.32},
    ],
}


def test_images_stand_before_their_sentences_unless_they_do_not_fit():
    assert web_pages.to_segments(PAGE) == [
        {"image": "a.png"},
        {"text": "One. Two."},
        {"image": "b.png"},
        {"text": "Three."},
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"storyboard": []},
        {"storyboard": {"frames": [], "seconds": 3, "subtitles": []}},
        {"storyboard": {"frames": ["a"], "seconds": "3", "subtitles": []}},
        {"storyboard": {"frames": ["a"], "seconds": 3, "subtitles": [[-1, "a"]]}},
        {"storyboard": {"frames": ["a"], "seconds": 3, "subtitles": [["a", 1]]}},
        {"storyboard": {"frames": ["a"], "seconds": float("inf"), "subtitles": []}},
    ],
)
def test_a_bad_storyboard_is_named(fields):
    with pytest.raises(captions.BadRecord, match="has a storyboard that is not"):
        storyboards.to_segments(fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_list": "One."}, "text_list that is no list"),
        ({"image_info": None}, "image_info that is not"),
        ({"image_info": [{"image_name": "a", "matched_text_index": 3, "matched_sim": 1}]}, "index"),
        ({"image_info": [{"image_name": "a", "matched_text_index": 0}]}, "image_info"),
    ],
)
def test_a_bad_web_page_is_named(changes, message):
    with pytest.raises(captions.BadRecord, match=message):
        web_pages.to_segments(PAGE | changes)


def test_a_folder_holds_them_beside_other_documents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(hostile.encoded(hostile.pixels(name == "b")))
    board = {"frames": ["a.png", "b.png"], "seconds": 8, "subtitles": [[1, "said"], [5, "more"]]}
    lines = [
        {"id": "board", "storyboard": board, "license": "x"},
        {"id": "page", **PAGE},
        {"id": "bad", "storyboard": {}},
    ]
    (tmp_path / sources.CAPTIONS).write_text("\n".join(map(json.dumps, lines)))
    first, page, bad = open_documents.open_documents(str(tmp_path)).read(0)
    kinds = [type(segment) for segment in first.document.segments]
    assert kinds == [Image, Text, Image, Text] and first.document.license == "x"
    np.testing.assert_array_equal(first.document.pictures[1], hostile.pixels(1))
    assert page.document.text == "One. Two. Three." and len(page.document.pictures) == 2
    assert bad.reject.name == "bad" and bad.reject.reason == "bad-segment"
