"""Guidance: its formulas with numbers computed by hand, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.decode import guidance
from rag_mm.decode.guidance import Guidance

ALL = (True, True, True)
FULL, DOCUMENTS, BARE = (0.6, 0.3, 0.1), (0.3, 0.6, 0.1), (0.2, 0.3, 0.5)


def steered(steering, *streams, allowed=ALL):
    """The distribution that tokens of given probabilities in each stream are sampled from."""
    # Logits are log-probabilities up to a constant, another one in each stream.
    logits = jnp.stack([jnp.log(jnp.array([p])) + i for i, p in enumerate(streams, start=1)])
    mask = jnp.array([allowed])
    combined = jnp.where(mask, steering.combine()(logits, mask), -jnp.inf)
    return np.asarray(jax.nn.softmax(combined)[0])


@pytest.mark.parametrize(
    ("steering", "streams", "expected"),
    [
        # p_full^2 / p_null = 1.8, 0.3, 0.02
        (Guidance(2.0), (FULL, BARE), [180 / 212, 30 / 212, 2 / 212]),
        # p_full^2 p_documents / p_bare^2 = 2.7, 0.6, 0.004
        (Guidance(2.0, documents_weight=3.0), (FULL, DOCUMENTS, BARE), [675 / 826, 150 / 826, 1 / 826]),
        # p_full / p_documents * p_bare: 0.4, 0.15, 0.5
        (Guidance(1.0, documents_weight=0.0), (FULL, DOCUMENTS, BARE), [8 / 21, 3 / 21, 10 / 21]),
        # At least 0.4 x 0.6 = 0.24
        (Guidance(2.0, plausible=0.4), (FULL, BARE), [6 / 7, 1 / 7, 0]),
        (Guidance(0.0, plausible=1.0), (FULL, BARE), [1, 0, 0]),
    ],
)  # fmt: skip
def test_by_hand(steering, streams, expected):
    np.testing.assert_allclose(steered(steering, *streams), expected, rtol=1e-5)


def test_what_is_plausible_is_so_among_the_allowed_tokens():
    """Without the likeliest token the threshold is 0.3 of 0.3, not of 0.6."""
    found = steered(Guidance(2.0, plausible=0.3), FULL, BARE, allowed=(False, True, True))
    np.testing.assert_allclose(found, [0, 15 / 16, 1 / 16], rtol=1e-5)


@pytest.mark.parametrize(
    ("steering", "kept"),
    [
        (Guidance(1.0), 0),
        (Guidance(0.0), 1),
        (Guidance(1.0, documents_weight=1.0), 0),
        (Guidance(0.0, documents_weight=1.0), 1),
        (Guidance(0.0, documents_weight=0.0), 2),
    ],
)
def test_weights_of_0_and_1_leave_one_stream_bit_for_bit(steering, kept):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 30, (len(steering.streams), 4, 500)), jnp.float32)
    combined = jax.jit(steering.combine())(logits, jnp.ones((1, 500), bool))
    np.testing.assert_array_equal(combined, logits[kept])


def test_the_largest_weight_gives_finite_logits():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 30, (2, 4, 500)), jnp.float32)
    combined = Guidance(guidance.LARGEST).combine()(logits, jnp.ones((1, 500), bool))
    assert jnp.isfinite(combined).all()


def test_streams_are_named_full_first():
    assert Guidance(2.0).streams == ("full", "bare")
    assert Guidance(2.0, null="caption").streams == ("full", "caption")
    assert Guidance(2.0, documents_weight=1.5).streams == ("full", "documents", "bare")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(weight=-1.0), "guidance weight is -1.0; give a number from 0 to 1e+30."),
        (dict(weight=1e39), "guidance weight is 1e+39; give a number from 0 to 1e+30."),
        (dict(weight=10**400), "give a number from 0 to 1e+30."),
        (dict(weight=True), "guidance weight is True; give a finite number."),
        (dict(weight=float("nan")), "guidance weight is nan; give a finite number."),
        (dict(weight=float("inf")), "guidance weight is inf; give a finite number."),
        (dict(weight="much"), "guidance weight is 'much'; give a finite number."),
        (dict(documents_weight=-0.5), "documents weight is -0.5; give a number from 0 to 1e+30."),
        (dict(documents_weight=1e31), "documents weight is 1e+31; give a number from 0 to 1e+30."),
        (dict(plausible=True), "plausible is True; give a finite number."),
        (dict(plausible=1.5), "plausible is 1.5; give a number from 0 to 1."),
        (dict(plausible=-0.1), "plausible is -0.1; give a number from 0 to 1."),
        (dict(null="full"), "null is 'full'; give one of documents, bare, caption."),
        (dict(null="documents", documents_weight=1.0), "has two null prompts"),
    ],
)
def test_what_is_refused(fields, says):
    with pytest.raises(UserError) as refused:
        Guidance(**fields)
    assert says in str(refused.value)


def test_a_null_prompt_that_training_never_showed_is_named_with_its_remedy():
    guidance.check_shown(("full", "caption"), {"caption"})
    with pytest.raises(UserError) as refused:
        guidance.check_shown(("full", "documents", "bare"), {"caption", "documents"})
    message = str(refused.value)
    assert "never saw the null prompt 'bare'" in message and "masking.caption_prob" in message
    assert "choose another null prompt (caption, documents)" in message
    with pytest.raises(UserError, match=r"null prompt 'bare'.*; train it with those"):
        guidance.check_shown(("full", "bare"), frozenset())
