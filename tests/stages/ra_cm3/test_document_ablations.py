"""The documents that a generator reads in each document ablation, and what its images should then show."""

import dataclasses
import types

import numpy as np
import pytest

from rag_mm.data.token_documents import pair
from rag_mm.stages.ra_cm3 import document_ablations
from rag_mm.worlds.emoji.emoji_scenes import Entity, Facts

MEMORY_FACTS = [Facts((Entity(c, 24, 0, 0),), "red") for c in (1, 1, 2, 2, 3)] + [
    Facts((Entity(4, 16, 0, 0), Entity(5, 16, 16, 16)), "blue")
]
MEMORY = [pair((10 + i,), np.full(4, i, np.int32)) for i in range(len(MEMORY_FACTS))]
IMAGE_TOKENIZER = types.SimpleNamespace(
    image_size=8,
    encode=lambda images: np.full((len(images), 4), 99, np.int32),
)


@pytest.fixture
def inputs():
    facts = [
        Facts((Entity(1, 24, 8, 8),), "green"),
        Facts((Entity(2, 24, 0, 8),), "black"),
        Facts((Entity(4, 16, 0, 0), Entity(5, 16, 16, 0)), "pink"),
    ]
    docs = [[MEMORY[0], MEMORY[1]], [MEMORY[2]], [MEMORY[5], MEMORY[5]]]
    return document_ablations.AblationInputs(facts, docs, MEMORY, MEMORY_FACTS, IMAGE_TOKENIZER)


def run(name, inputs):
    return document_ablations.ABLATIONS[name](inputs, np.random.default_rng(0))


def test_oracle_documents_show_each_entity_in_turn(inputs):
    docs, expected = run("oracle_documents", inputs)
    assert expected is None and [len(own) for own in docs] == [2, 1, 2]
    rows = [[int(doc.codes[0]) for doc in own] for own in docs]
    assert set(rows[0]) <= {0, 1} and set(rows[1]) <= {2, 3} and rows[2] == [5, 5]


def test_an_entity_that_no_document_shows_gets_no_oracle_document(inputs):
    unknown = Facts((Entity(77, 16, 0, 0), Entity(2, 16, 16, 16)), "red")
    inputs = dataclasses.replace(inputs, facts=[unknown], docs=[[MEMORY[0], MEMORY[1]]])
    docs, _ = run("oracle_documents", inputs)
    assert {int(doc.codes[0]) for doc in docs[0]} <= {2, 3} and len(docs[0]) == 2


def test_counterfactual_documents_keep_the_captions_and_swap_images_and_expected_facts(inputs):
    docs, expected = run("counterfactual_documents", inputs)
    assert docs[0][0].text == MEMORY[0].text and docs[0][0].codes[0] == 2
    assert expected[0] == dataclasses.replace(inputs.facts[0], entities=(Entity(2, 24, 8, 8),))
    assert expected[1].entities == (Entity(1, 24, 0, 8),)
    # No other query has two entities, so this one is unchanged.
    assert expected[2] == inputs.facts[2] and docs[2][0].codes[0] == 5


def test_one_sided_documents_keep_their_other_side(inputs):
    docs, _ = run("image_only_documents", inputs)
    assert all(not doc.text for own in docs for doc in own) and docs[1][0].codes[0] == 2
    docs, _ = run("text_only_documents", inputs)
    assert docs[1][0].text == MEMORY[2].text and (docs[1][0].codes == 99).all()
