"""Rows are planned by lengths: every document once an epoch, corpora by their weights, no row too long."""

import numpy as np
import pytest
from corpus_cases import CodeStandIn, build, documents

from rag_mm.core.errors import UserError
from rag_mm.corpus import packing_plan, shuffled_order
from rag_mm.corpus.packing_plan import MixturePart, RowPlanner, RowsConfig


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000])
def test_an_order_has_every_document_once(size):
    orders = [shuffled_order.permute(np.arange(size), size, seed, 0) for seed in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(size))
    assert size < 4 or (orders[0] != orders[1]).any()


def test_an_order_is_random():
    size = 10_000
    order = shuffled_order.permute(np.arange(size), size, 3)
    np.testing.assert_array_equal(shuffled_order.permute(np.array([7, 9]), size, 3), order[[7, 9]])
    assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.04
    # Neighbors in the order are as far apart as two random documents: a third of all.
    assert abs(np.abs(np.diff(order)).mean() / size - 1 / 3) < 0.02
    halves = (order < size // 2).reshape(100, 100).sum(axis=1)
    assert 3.5 < halves.std() < 6.5  # Binomial: 5.


def test_rows_hold_every_example_once_and_are_nearly_full():
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    rows = packing_plan.fill_rows(lengths, 100)
    assert sorted(example for row in rows for example in row) == list(range(500))
    assert max(lengths[row].sum() for row in rows) <= 100
    assert lengths.sum() / (100 * len(rows)) > 0.98
    with pytest.raises(ValueError, match="longer than a row"):
        packing_plan.fill_rows(lengths, 50)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Two corpora, of 10 and 6 documents."""
    folder = tmp_path_factory.mktemp("corpora")
    return [build(folder / "a", documents(10)), build(folder / "b", documents(6, 10))]


def plans(planner, count):
    counts = (0,) * len(planner.parts)
    for window in range(count):
        plan, counts = planner.plan(window, counts)
        yield plan


def test_every_document_once_an_epoch_in_another_order(corpora):
    planner = RowPlanner([MixturePart(corpora[0])], RowsConfig(64, window=4))
    drawn = np.concatenate([plan.document for plan in plans(planner, 10)]).reshape(4, 10)
    assert (np.sort(drawn, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in drawn.tolist()}) == 4


def test_corpora_are_drawn_by_their_weights(corpora):
    parts = [MixturePart(corpora[0], 3.0), MixturePart(corpora[1], 1.0)]
    planner = RowPlanner(parts, RowsConfig(64))
    found = list(plans(planner, 4))
    part = np.concatenate([plan.part for plan in found])
    assert abs(part.mean() - 0.25) < 0.03
    for number, size in enumerate((10, 6)):
        drawn = np.concatenate([plan.document[plan.part == number] for plan in found])
        counts = np.bincount(drawn, minlength=size)
        assert len(counts) == size and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_positive_number_is_refused(corpora, weight):
    with pytest.raises(UserError, match="weight of .* is .*; give a positive number"):
        RowPlanner([MixturePart(corpora[0]), MixturePart(corpora[1], weight)], RowsConfig(64))


def test_corpora_of_two_tokenizers_are_not_mixed(corpora, tmp_path):
    other = build(tmp_path / "other", documents(3), CodeStandIn("another"))
    with pytest.raises(UserError, match="holds codes of the image tokenizer another, not of"):
        RowPlanner([MixturePart(corpora[0]), MixturePart(other)], RowsConfig(64))


def test_documents_longer_than_a_row_are_left_out(corpora):
    lengths = corpora[0].lengths(1024)
    room = int(np.median(lengths)) + 1
    planner = RowPlanner([MixturePart(corpora[0])], RowsConfig(room, window=10))
    assert planner.num_too_long == (lengths >= room).sum()
    (plan,) = plans(planner, 1)
    assert (lengths[plan.document] < room).all()
    with pytest.raises(UserError, match="No document of .* fits a row of 5 tokens"):
        RowPlanner([MixturePart(corpora[0])], RowsConfig(5))


@pytest.mark.parametrize("weights", [(0.0, 0.0), (-1.0, 2.0), (float("nan"),)])
def test_relative_frequencies_of_documents_are_checked(weights):
    with pytest.raises(UserError, match="num_docs_weights"):
        RowsConfig(64, num_docs_weights=weights)
