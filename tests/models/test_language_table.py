"""From word vectors to a frozen codebook."""

import numpy as np
import pytest

from rag_mm.models.spae import language_table


def _rows(count=300, width=20):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, width)) * np.geomspace(4, 0.1, width) + 3


def test_a_whitened_table_has_equal_spreads_no_mean_and_the_common_scale():
    table = language_table.principal(_rows(), 8, is_whitened=True, is_unit=False)
    assert table.shape == (300, 8) and table.dtype == np.float32
    np.testing.assert_allclose(table.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(table.std(axis=0), language_table.RMS, rtol=1e-4)
    plain = language_table.principal(_rows(), 8, is_whitened=False, is_unit=False)
    assert plain.std(axis=0)[0] > 3 * plain.std(axis=0)[-1]
    assert np.sqrt(np.mean(plain**2)) == pytest.approx(language_table.RMS, rel=1e-5)


@pytest.mark.parametrize("count", [300, 12])
def test_components_are_those_of_a_singular_value_decomposition_but_for_their_sign(count):
    """With more rows than columns and with fewer; the rows span nine directions."""
    rows = _rows(count)[:, :9] @ np.random.default_rng(1).normal(size=(9, 20))
    table = language_table.principal(rows, 9, is_whitened=False, is_unit=False)
    left, spreads, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    wanted = (left * spreads)[:, :9]
    wanted *= language_table.RMS / np.sqrt(np.mean(wanted**2))
    np.testing.assert_allclose(np.abs(table), np.abs(wanted), atol=1e-5)
    signs = np.sign((table * wanted).sum(axis=0))
    np.testing.assert_allclose(table * signs, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="span 9 directions, fewer than 10"):
        language_table.principal(rows, 10, is_whitened=False, is_unit=False)


def test_unit_rows_have_one_length():
    table = language_table.principal(_rows(), 5, is_whitened=False, is_unit=True)
    lengths = np.linalg.norm(table, axis=1)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"), [(np.nan, "not finite"), (0.0, "span 0 directions, fewer than 4")]
)
def test_vectors_that_make_no_table_are_rejected(change, message):
    with pytest.raises(ValueError, match=message):
        language_table.principal(_rows() * change, 4, is_whitened=True, is_unit=False)


def test_alignment_recovers_features_that_are_linear_in_the_vectors():
    rows, rng = _rows(), np.random.default_rng(1)
    features = rows @ rng.normal(size=(20, 6))
    features = features - features.mean(axis=0)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = (language_table.aligned(rows, unit, ridge=1e-3) * unit).sum(axis=1)
    assert cosines.mean() > 0.8
    shuffled = unit[rng.permutation(len(unit))]
    assert (language_table.aligned(rows, shuffled) * unit).sum(axis=1).mean() < 0.2


def test_words_without_features_are_mapped_but_not_fitted():
    rows, rng = _rows(), np.random.default_rng(1)
    features = rows @ rng.normal(size=(20, 6))
    few = np.where(np.arange(300)[:, None] < 100, features, 0)
    alone = language_table.aligned(rows, few, ridge=1e-6)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(alone, unit, atol=1e-3)


def test_matched_shortcuts_spread_patches_as_the_table_and_lead_back():
    rng = np.random.default_rng(2)
    patches = rng.normal(size=(500, 12)) @ rng.normal(size=(12, 12)) * 0.1 + 0.5
    table = language_table.principal(_rows(), 12, is_whitened=True, is_unit=False)
    into, back = language_table.matched_shortcuts(patches, table)
    latents = patches @ into["kernel"] + into["bias"]
    np.testing.assert_allclose(latents.std(axis=0), table.std(axis=0), rtol=1e-3)
    np.testing.assert_allclose(latents @ back["kernel"] + back["bias"], patches, atol=1e-4)


def test_fewer_patch_components_than_the_table_has_leave_the_rest_at_zero():
    table = language_table.principal(_rows(), 10, is_whitened=True, is_unit=False)
    into, back = language_table.matched_shortcuts(np.random.default_rng(3).random((50, 4)), table)
    assert not into["kernel"][:, 4:].any() and not back["kernel"][4:].any()
    assert into["kernel"][:, :4].any(axis=0).all()


def test_noise_of_patches_is_not_amplified():
    rng = np.random.default_rng(3)
    gray = np.repeat(rng.random((500, 4)), 3, axis=1)
    table = language_table.principal(_rows(), 10, is_whitened=True, is_unit=False)
    into, _ = language_table.matched_shortcuts(gray + 1e-4 * rng.random((500, 12)), table)
    assert np.abs(into["kernel"]).max() < 2 and not into["kernel"][:, 4:].any()


def test_the_guide_maps_embeddings_to_wanted_latents():
    rng = np.random.default_rng(4)
    embeddings = rng.normal(size=(400, 6))
    wanted = embeddings @ rng.normal(size=(6, 3)) + 2
    guide = language_table.least_squares_guide(embeddings, wanted, ridge=1e-6)
    np.testing.assert_allclose(embeddings @ guide["kernel"] + guide["bias"], wanted, atol=1e-3)
