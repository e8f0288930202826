"""How classes are divided into common, rare, tune and test ones."""

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.worlds.emoji import art, class_splits, names


@pytest.mark.parametrize("seed", [0, 1])
def test_shares_hold_for_flags_and_for_the_rest(seed):
    split, is_flag = class_splits.split_of(seed), art.load_art().is_flag
    for chosen in (is_flag, ~is_flag):
        shares = np.bincount(split[chosen], minlength=4) / chosen.sum()
        np.testing.assert_allclose(shares, (0.7, 0.15, 0.075, 0.075), atol=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_held_out_is_tune_and_test_of_equal_size(seed):
    halves = [class_splits.classes(name, seed=seed) for name in ("tune", "test")]
    assert len(halves[0]) == len(halves[1])
    whole = class_splits.classes("held_out", seed=seed)
    np.testing.assert_array_equal(whole, np.sort(np.concatenate(halves)))
    # Another seed holds other classes out.
    other = class_splits.classes("held_out", seed=seed + 1)
    assert len(set(whole) & set(other)) < len(whole) / 3


def test_variants_of_one_drawing_fall_in_one_split():
    split = class_splits.split_of()
    splits_of_base = {}
    for class_id, its_names in enumerate(art.load_art().names):
        for name in its_names:
            splits_of_base.setdefault(names.base_name(name), set()).add(split[class_id])
    assert all(len(found) == 1 for found in splits_of_base.values())


def test_splits_part_the_classes_and_depend_on_the_seed_alone():
    parts = [class_splits.classes(name) for name in class_splits.SPLITS]
    assert sorted(np.concatenate(parts)) == list(range(art.load_art().num_classes))
    np.testing.assert_array_equal(
        class_splits.classes("common", "rare_seen"), sorted([*parts[0], *parts[1]])
    )
    assert (class_splits.split_of(0) != class_splits.split_of(1)).any()


def test_a_mistyped_split_is_named():
    with pytest.raises(UserError, match="'heldout'; choose from common"):
        class_splits.classes("heldout")
