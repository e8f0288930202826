"""The losses of CM3 and RA-CM3: the weight of each target and the normalization of the sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag_mm.core.roles import IGNORED, MAIN, RETRIEVED, SENTINEL
from rag_mm.data import sequences, token_documents, vocabulary
from rag_mm.models import cm3, ra_cm3
from rag_mm.nn import decoder

V, CODE_OFFSET = 9, 6
ROLES = np.array([[2, 2, 3, 1, 1, 1, 0], [3, 1, 1, 2, 1, 0, 0]], np.int8)
BATCH = {
    "tokens": np.zeros((2, 7), np.int32),
    "targets": np.array([[1, 7, 0, 2, 8, 6, 4], [3, 0, 7, 8, 5, 1, 1]], np.int32),
    "positions": np.zeros((2, 7), np.int32),
    "segment_ids": np.ones((2, 7), np.int32),
    "roles": ROLES,
}
LOGITS = np.random.default_rng(0).normal(size=(2, 7, V)).astype(np.float32)
NLL = (
    np.log(np.exp(LOGITS.astype(float)).sum(-1))
    - np.take_along_axis(LOGITS, BATCH["targets"][..., None], -1)[..., 0]
)


class FixedLogits(decoder.Decoder):
    """A model whose logits are given, so that their gradients show every target's weight."""

    def __init__(self, logits):
        self.hidden = logits

    def __call__(self, tokens, positions, segment_ids):
        return self.hidden

    def logits(self, hidden):
        return hidden


def loss_fn(logits, retrieved_weight, batch=BATCH, **options):
    model, batch = FixedLogits(logits), jax.tree.map(jnp.asarray, batch)
    options["code_offset"] = CODE_OFFSET
    return cm3.loss_fn(model, batch, retrieved_weight=retrieved_weight, **options)


GRAD = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_retrieved_targets_have_weight_alpha_and_the_sum_is_divided_by_main_targets(alpha):
    (loss, metrics), grad = GRAD(jnp.asarray(LOGITS), jnp.float32(alpha))
    weights = np.select([ROLES == MAIN, ROLES == RETRIEVED], [1.0, alpha], 0.0)
    num_main = (ROLES == MAIN).sum()
    np.testing.assert_allclose(loss, (NLL * weights).sum() / num_main, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], loss, rtol=1e-6)
    # d loss / d logits = weight (p - one hot) / number of main targets.
    probs = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    expected = (probs - np.eye(V)[BATCH["targets"]]) * weights[..., None] / num_main
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_with_alpha_zero_retrieved_targets_have_no_gradient():
    _, grad = GRAD(jnp.asarray(LOGITS), jnp.float32(0))
    assert (np.asarray(grad)[ROLES != MAIN] == 0).all()
    assert (np.asarray(grad)[ROLES == MAIN] != 0).any(-1).all()


def test_sentinels_and_padding_have_weight_zero():
    _, grad = GRAD(jnp.asarray(LOGITS), jnp.float32(1))
    assert (np.asarray(grad)[(ROLES == IGNORED) | (ROLES == SENTINEL)] == 0).all()


def test_divided_by_its_weights_the_loss_is_the_mean_over_all_targets():
    """CM3Leon: those of retrieved documents and sentinels count like the others, padding does not."""
    compute = jax.value_and_grad(loss_fn, has_aux=True)
    options = dict(sentinel_weight=1.0, normalize_by="weights")
    (loss, metrics), grad = compute(jnp.asarray(LOGITS), 1.0, **options)
    is_target = ROLES != IGNORED
    np.testing.assert_allclose(loss, NLL[is_target].mean(), rtol=1e-5)
    assert float(metrics["loss"][1]) == is_target.sum()
    probs = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    expected = (probs - np.eye(V)[BATCH["targets"]]) * is_target[..., None] / is_target.sum()
    np.testing.assert_allclose(grad, expected, atol=1e-6)
    # At other weights, it is the weighted mean.
    weights = np.select([ROLES == MAIN, ROLES == RETRIEVED, ROLES == SENTINEL], [1.0, 0.5, 0.25])
    options["sentinel_weight"] = 0.25
    loss, metrics = loss_fn(jnp.asarray(LOGITS), 0.5, **options)
    np.testing.assert_allclose(loss, np.average(NLL, weights=weights), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"][1], weights.sum(), rtol=1e-6)


def test_metrics_are_sums_with_their_weights():
    (_, metrics), _ = GRAD(jnp.asarray(LOGITS), jnp.float32(0.1))
    is_code, main = BATCH["targets"] >= CODE_OFFSET, ROLES == MAIN
    for name, mask in {
        "main_nll": main,
        "code_nll": main & is_code,
        "text_nll": main & ~is_code,
        "retrieved_nll": ROLES == RETRIEVED,
    }.items():
        total, weight = metrics[name]
        np.testing.assert_allclose(total, NLL[mask].sum(), rtol=1e-5, err_msg=name)
        assert int(weight) == mask.sum(), name
    is_majority = np.log(2) > NLL
    assert int(metrics["code_majority"][0]) == (is_majority & main & is_code).sum()


@pytest.mark.parametrize("normalize_by", cm3.NORMALIZE_BY)
def test_a_batch_without_targets_is_finite(normalize_by):
    batch = BATCH | {"roles": np.zeros_like(ROLES)}
    loss, metrics = loss_fn(jnp.asarray(LOGITS), 0.1, batch, normalize_by=normalize_by)
    assert loss == 0 and all(np.isfinite(total) for total, _ in metrics.values())


def test_the_loss_of_a_real_sequence_under_a_uniform_model():
    """It is log V (main + alpha retrieved) / main, with the numbers of main and retrieved targets."""
    vocab = vocabulary.train_vocabulary([], 256, 16, 4)
    layout = sequences.Layout(max_docs=1, max_text_len=3, num_codes=4, max_spans=1)
    example = token_documents.pair([1, 2], np.arange(4, dtype=np.int32))
    # The middle of the main image is masked: a sentinel in its place, then a sentinel and eoss at the end.
    row = sequences.make_row(layout, vocab, example, [example], np.array([[13, 15]]))
    batch = {name: jnp.asarray(value)[None] for name, value in row.items()}
    config = ra_cm3.RACM3Config(
        decoder.DecoderConfig(vocab.size, 1, 8, 1, 8, 8), vocab.code_offset, alpha=0.5
    )
    logits = jnp.zeros((1, layout.length, vocab.size))
    loss, metrics = ra_cm3.loss_fn(FixedLogits(logits), batch, jax.random.key(0), config=config)
    main, retrieved = (
        2 + 1 + 4 + 1 + 1,
        2 + 1 + 4 + 1,
    )  # text BRK image EOD eoss; text BRK image BRK
    assert (metrics["main_nll"][1], metrics["retrieved_nll"][1]) == (main, retrieved)
    assert metrics["code_nll"][1] == 4
    np.testing.assert_allclose(
        loss, np.log(vocab.size) * (main + 0.5 * retrieved) / main, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"normalize_by": "targets"}, "one of main, weights"),
        ({"sentinel_weight": -1.0}, "sentinel_weight is -1.0"),
        ({"alpha": -0.1}, "alpha is -0.1"),
    ],
)
def test_an_unknown_divisor_and_negative_weights_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        ra_cm3.RACM3Config(decoder.DecoderConfig(9, 1, 8, 1, 8, 8), 6, **changes)
