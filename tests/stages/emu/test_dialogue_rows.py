"""Dialogues to tune on: true answers about a scene, its picture once, documents before it, and what fits."""

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.core.image_slots import SlotTokens
from rag_mm.core.roles import MAIN
from rag_mm.data.interleaved import Mark
from rag_mm.stages.emu.dialogue_rows import DialogueConfig, DialogueSource
from rag_mm.stages.emu.row_maker import RowMaker, RowSize
from rag_mm.stages.shared import world_config
from rag_mm.worlds.emoji import emoji_scenes, scene_tasks

WORLD = world_config.EmojiWorld(class_share=0.05, seed=3)
SCENES = WORLD.scenes("train", *world_config.SEEN)
IDS = SlotTokens(*range(256, 262))
MARKS = {Mark.USER: (262,), Mark.ASSISTANT: (263,), Mark.END: (IDS.end,)}
# A text is its bytes.
MAKER = RowMaker(lambda text: list(text.encode()), IDS, 2, 80, MARKS)
VECTORS = np.arange(1, 9, dtype=np.float16)[:, None, None] * np.ones((1, 2, 3), np.float16)


def make(length=400, **changes):
    rows = np.array([0, 5, 9])
    return DialogueSource(
        DialogueConfig(**changes),
        SCENES,
        rows,
        np.array([0, 1, 2]),
        np.array([[7], [7], [-1]], np.int32),
        {7: (3, "a document")},
        MAKER,
        VECTORS,
        RowSize(2, length, 4),
    )


def drawn(source, index, count=40):
    rng = np.random.default_rng(0)
    return [source.make(np.int64(index), rng) for _ in range(count)]


def text(ids):
    return bytes(each for each in ids if each < 256).decode()


def answers(row):
    said = [int(i) for i, role in zip(row["targets"], row["roles"], strict=True) if role == MAIN]
    whole = "".join("|" if i == IDS.end else chr(i) for i in said)
    return whole.removesuffix("|").split("|")


def test_answers_are_true_of_the_scene_and_each_question_comes_once():
    facts, level = SCENES.facts(5), SCENES.levels[5]
    (entity,) = facts.entities
    true = {
        "describe it": SCENES.full_caption(5),
        "which color is the background?": facts.color,
        "where": emoji_scenes.place(entity, level),
        "what": scene_tasks.first_name(entity),
    }
    seen, lengths = set(), set()
    for row in drawn(make(num_docs_weights=(1.0,)), 1):
        asked = [text(part).strip() for part in _split(row["tokens"])]
        assert row["pictures"].tolist() == [1] and len(asked) == len(answers(row))
        for question, answer in zip(asked, answers(row), strict=True):
            key = question if question in true else question.split()[0]
            assert answer == true[key]
            seen.add(key)
        assert len(set(asked)) == len(asked)
        lengths.add(len(asked))
    assert seen == set(true) and lengths == {1, 2}


def _split(tokens):
    """What the user says in each turn."""
    parts, own = [], []
    for token in tokens:
        if token == MARKS[Mark.ASSISTANT][0]:
            parts.append(own)
        own = [] if token == MARKS[Mark.USER][0] else [*own, token]
    return parts


def test_documents_come_first_as_often_as_they_should():
    rows = drawn(make(num_docs_weights=(0.5, 0.5)), 0)
    counts = [len(row["pictures"]) for row in rows]
    assert set(counts) == {1, 2} and 10 < sum(count == 2 for count in counts) < 30
    for row in rows:
        first = text(row["tokens"][: np.flatnonzero(row["tokens"] == 262)[0]])
        assert first == ("a document" if row["pictures"][0] == 3 else "")
    # Where nothing was retrieved nothing is read.
    assert all(len(row["pictures"]) == 1 for row in drawn(make(num_docs_weights=(0.0, 1.0)), 2))


def test_what_does_not_fit_is_left_out_documents_first():
    short = dict(tasks=("which_color",), num_docs_weights=(0.0, 1.0))
    row = make(**short).make(np.int64(0), np.random.default_rng(0))
    length = len(row["tokens"])
    assert len(row["pictures"]) == 2
    row = make(length - 1, **short).make(np.int64(0), np.random.default_rng(0))
    assert len(row["pictures"]) == 1 and answers(row) == [SCENES.facts(0).color]
    with pytest.raises(UserError, match="do not fit a row"):
        make(20, **short).make(np.int64(0), np.random.default_rng(0))


def test_pictures_become_their_vectors_and_filling_zeros():
    taken = make()._take(np.array([[2, -1], [0, 7]]))
    assert taken.shape == (2, 2, 2, 3) and taken.dtype == np.float16
    np.testing.assert_array_equal(taken[:, :, 1, 2], [[3, 0], [1, 8]])


@pytest.mark.parametrize(
    "wrong", [dict(tasks=("why",)), dict(num_docs_weights=(0.0,)), dict(max_turns=0)]
)
def test_dialogues_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DialogueConfig(**wrong)
