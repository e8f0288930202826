"""The examples of a report depend on the order of the test documents, not on generated images."""

import numpy as np

from rag_mm.report import selection

CLASS_IDS = np.array([3, 3, 5, 7, 7, 7, 9, 11, 13, 13, 15, 17])
IS_FLAG = np.isin(CLASS_IDS, [5, 9, 13])


def test_the_first_document_of_each_class():
    assert selection.first_of_each_class(CLASS_IDS).tolist() == [0, 2, 3, 6, 7, 8, 10, 11]
    # In document order, not in class order.
    assert selection.first_of_each_class(np.array([4, 2, 4, 1, 2])).tolist() == [0, 1, 3]


def test_flags_and_others_are_evenly_spaced():
    places = selection.choose(CLASS_IDS, IS_FLAG, num_flags=2, num_others=3)
    assert CLASS_IDS[places].tolist() == [3, 5, 11, 13, 17]
    assert IS_FLAG[places].sum() == 2


def test_if_there_are_fewer_all_are_selected():
    places = selection.choose(CLASS_IDS, IS_FLAG, num_flags=9, num_others=9)
    assert places.tolist() == selection.first_of_each_class(CLASS_IDS).tolist()
    assert selection.choose(CLASS_IDS, np.zeros(12, bool), 4, 1).tolist() == [0]
    assert selection.choose(CLASS_IDS, IS_FLAG, 0, 0).tolist() == []


def test_the_rule_states_how_many_were_selected():
    assert "4 flags and 6 others, evenly spaced" in selection.rule(4, 6)
    assert "4 flags and 1 other, evenly" in selection.rule(4, 1)
    assert " 6 others, evenly" in selection.rule(0, 6) and "flags" not in selection.rule(0, 6)
