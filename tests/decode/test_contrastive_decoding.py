"""Contrastive decoding: CD-K with numbers computed by hand, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.decode.contrastive_decoding import Contrast

FULL, NULL = (0.5, 0.3, 0.15, 0.05), (0.1, 0.3, 0.3, 0.3)


@pytest.mark.parametrize(
    ("contrast", "allowed", "expected"),
    [
        # p_full / p_null = 5, 1, 1/2, 1/6, of the tokens of at least 0.25
        (Contrast(k=1, alpha=0.5), "1111", [5 / 6, 1 / 6, 0, 0]),
        # 0.4 x the second largest, 0.12
        (Contrast(k=2, alpha=0.4), "1111", [10 / 13, 2 / 13, 1 / 13, 0]),
        # 0.4 x the largest, 0.2, which is more
        (Contrast(k=2, alpha=0.4, floor=0.4), "1111", [5 / 6, 1 / 6, 0, 0]),
        # p_full / p_null^2 = 50, 10/3
        (Contrast(k=1, alpha=0.5, amateur_temperature=0.5), "1111", [15 / 16, 1 / 16, 0, 0]),
        # The largest allowed is 0.3, the second 0.15, the third 0.05
        (Contrast(k=1, alpha=0.4), "0111", [0, 2 / 3, 1 / 3, 0]),
        (Contrast(k=3, alpha=0.9), "0111", [0, 6 / 10, 3 / 10, 1 / 10]),
        # There is no fourth.
        (Contrast(k=4, alpha=1.0), "0111", [0, 6 / 10, 3 / 10, 1 / 10]),
        (Contrast(k=10**12, alpha=1.0), "1111", [30 / 40, 6 / 40, 3 / 40, 1 / 40]),
        (Contrast(k=1, alpha=1.0), "1111", [1, 0, 0, 0]),
        (Contrast(k=1, alpha=0.0), "1111", [30 / 40, 6 / 40, 3 / 40, 1 / 40]),
    ],
)
def test_by_hand(contrast, allowed, expected):
    logits = jnp.stack([jnp.log(jnp.array([FULL])) + 2, jnp.log(jnp.array([NULL])) - 1])
    mask = jnp.array([[digit == "1" for digit in allowed]])
    combined = jnp.where(mask, contrast.combine()(logits, mask), -jnp.inf)
    np.testing.assert_allclose(jax.nn.softmax(combined)[0], expected, rtol=1e-5)


def test_rows_are_contrasted_on_their_own():
    """Each with its own k-th largest, wherever that is."""
    order = [2, 0, 3, 1]
    full, null = np.log(FULL), np.log(NULL)
    logits = jnp.asarray([[full, full[order]], [null, null[order]]], jnp.float32)
    one, other = Contrast(k=2, alpha=0.4).combine()(logits, jnp.ones((1, 4), bool))
    np.testing.assert_array_equal(other, one[jnp.array(order)])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(k=0), "contrast k is 0; give an integer of at least 1."),
        (dict(k=1.5), "contrast k is 1.5; give an integer of at least 1."),
        (dict(alpha=1.1), "contrast alpha is 1.1; give a number from 0 to 1."),
        (dict(alpha=-0.1), "contrast alpha is -0.1; give a number from 0 to 1."),
        (dict(floor=2), "contrast floor is 2; give a number from 0 to 1."),
        (dict(k=True), "contrast k is True; give an integer of at least 1."),
        (dict(floor=False), "contrast floor is False; give a finite number."),
        (dict(amateur_temperature=0.0), "amateur temperature is 0.0; give a number from 1e-30 to 1e+30."),
        (dict(amateur_temperature=1e-40), "amateur temperature is 1e-40; give a number from 1e-30 to 1e+30."),
        (dict(amateur_temperature=1e39), "amateur temperature is 1e+39; give a number from 1e-30 to 1e+30."),
        (dict(null="none"), "null is 'none'; give one of documents, bare, caption."),
    ],
)  # fmt: skip
def test_what_is_refused(fields, says):
    with pytest.raises(UserError) as refused:
        Contrast(**fields)
    assert str(refused.value) == says
