"""What a generator reads under each control, and what its pictures should then show."""

import dataclasses
import types

import numpy as np
import pytest

from rag_mm.data.sequences import Example
from rag_mm.stages.ra_cm3 import document_ablations
from rag_mm.worlds.emoji.emoji_scenes import Entity, Facts

SHOWN = [Facts((Entity(c, 24, 0, 0),), "red") for c in (1, 1, 2, 2, 3)] + [
    Facts((Entity(4, 16, 0, 0), Entity(5, 16, 16, 16)), "blue")
]
MEMORY = [Example((10 + i,), np.full(4, i, np.int32)) for i in range(len(SHOWN))]
CODEC = types.SimpleNamespace(
    config=types.SimpleNamespace(image_size=8),
    encode=lambda pictures: np.full((len(pictures), 4), 99, np.int32),
)


@pytest.fixture
def asked():
    facts = [
        Facts((Entity(1, 24, 8, 8),), "green"),
        Facts((Entity(2, 24, 0, 8),), "black"),
        Facts((Entity(4, 16, 0, 0), Entity(5, 16, 16, 0)), "pink"),
    ]
    docs = [[MEMORY[0], MEMORY[1]], [MEMORY[2]], [MEMORY[5], MEMORY[5]]]
    return document_ablations.AblationInputs(facts, docs, MEMORY, SHOWN, CODEC)


def run(name, asked):
    return document_ablations.ABLATIONS[name](asked, np.random.default_rng(0))


def test_oracle_documents_show_each_entity_in_turn(asked):
    docs, wanted = run("oracle_documents", asked)
    assert wanted is None and [len(each) for each in docs] == [2, 1, 2]
    rows = [[int(doc.codes[0]) for doc in each] for each in docs]
    assert set(rows[0]) <= {0, 1} and set(rows[1]) <= {2, 3} and rows[2] == [5, 5]


def test_an_entity_that_no_document_shows_has_no_oracle(asked):
    unknown = Facts((Entity(77, 16, 0, 0), Entity(2, 16, 16, 16)), "red")
    asked = dataclasses.replace(asked, facts=[unknown], docs=[[MEMORY[0], MEMORY[1]]])
    docs, _ = run("oracle_documents", asked)
    assert {int(doc.codes[0]) for doc in docs[0]} <= {2, 3} and len(docs[0]) == 2


def test_counterfactual_documents_keep_the_words_and_change_the_picture_and_what_is_wanted(asked):
    docs, wanted = run("counterfactual_documents", asked)
    assert docs[0][0].text == MEMORY[0].text and docs[0][0].codes[0] == 2
    assert wanted[0] == dataclasses.replace(asked.facts[0], entities=(Entity(2, 24, 8, 8),))
    assert wanted[1].entities == (Entity(1, 24, 0, 8),)
    # No other query asks for a pair, so this one stays what it was.
    assert wanted[2] == asked.facts[2] and docs[2][0].codes[0] == 5


def test_half_documents_keep_their_other_half(asked):
    docs, _ = run("image_only_documents", asked)
    assert all(not doc.text for each in docs for doc in each) and docs[1][0].codes[0] == 2
    docs, _ = run("text_only_documents", asked)
    assert docs[1][0].text == MEMORY[2].text and (docs[1][0].codes == 99).all()
