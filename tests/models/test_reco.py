"""RECO: fusion against NumPy, the frozen model at step 0, invariance to neighbor order, the loss by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scaled_gradients
from flax import nnx

from rag_mm.core import sharding
from rag_mm.models import reco
from rag_mm.train import optimizer

DIM, HEADS, B, K = 16, 4, 6, 5
CONFIG = reco.RecoConfig(dim=DIM, num_heads=HEADS, mlp_ratio=2.0)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def make_model(**changes) -> reco.RECO:
    """With all weights random, so that none is zero by initialization."""
    config = dataclasses.replace(CONFIG, **changes)
    model = reco.RECO(config, rngs=nnx.Rngs(params=0))
    rng = np.random.default_rng(1)
    graphdef, state = nnx.split(model)
    random = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), state
    )
    return nnx.merge(graphdef, random)


def sample_inputs(rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    query, retrieved = unit(rng.standard_normal((B, DIM))), unit(rng.standard_normal((B, K, DIM)))
    return query, retrieved, np.ones((B, K), bool)


def layer_norm(x, norm):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def linear(x, layer, spec):
    return np.einsum(spec, x, np.asarray(layer.kernel[...])) + np.asarray(layer.bias[...])


def naive_layer(block, x):
    """A pre-norm encoder layer over x [1 + K, D]."""
    normed, a = layer_norm(x, block.attention_norm), block.attention
    q, k, v = (linear(normed, part, "td,dnh->tnh") for part in (a.q, a.k, a.v))
    scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = x + linear(np.einsum("nts,snh->tnh", weights, v), a.out, "tnh,nhd->td")
    hidden = linear(layer_norm(x, block.mlp_norm), block.mlp.up, "td,df->tf")
    gelu = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return x + linear(gelu, block.mlp.down, "tf,fd->td")


def test_the_fusion_is_an_encoder_layer_read_at_the_query(rng):
    query, retrieved, neighbor_mask = sample_inputs(rng)
    fusion = make_model().image_fusion
    for refined, inputs in zip(
        np.asarray(fusion(query, retrieved, neighbor_mask)),
        np.concatenate([query[:, None], retrieved], axis=1),
        strict=True,
    ):
        np.testing.assert_allclose(refined, unit(naive_layer(fusion.block, inputs)[0]), atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_layers": 3},
        {"norm_placement": "post"},
        {"extra_skip": True},
        {"type_embedding": True},
    ],
    ids=str,
)
def test_step_0_is_the_frozen_model(rng, changes):
    model = reco.RECO(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(params=0))
    query, *neighbors = sample_inputs(rng)
    for refined in (model.refine_image(query, *neighbors), model.refine_text(query, *neighbors)):
        np.testing.assert_allclose(refined, query, atol=1e-5)


def test_in_bfloat16_step_0_changes_nothing_either(rng):
    """The query is not rounded to the three digits of the activations."""
    model = reco.RECO(CONFIG, rngs=nnx.Rngs(params=0), dtype="bfloat16")
    query, *neighbors = sample_inputs(rng)
    np.testing.assert_allclose(model.refine_image(query, *neighbors), query, atol=1e-5)


def test_without_zero_init_step_0_changes_the_embeddings(rng):
    model = reco.RECO(dataclasses.replace(CONFIG, is_zero_init=False), rngs=nnx.Rngs(params=0))
    query, *neighbors = sample_inputs(rng)
    assert np.abs(np.asarray(model.refine_image(query, *neighbors)) - query).max() > 0.01


@pytest.mark.parametrize("changes", [{}, {"num_layers": 2}, {"type_embedding": True}], ids=str)
def test_the_order_of_neighbors_does_not_matter(rng, changes):
    query, retrieved, neighbor_mask = sample_inputs(rng)
    neighbor_mask[:, -2:] = False
    fusion = make_model(**changes).text_fusion
    order = rng.permutation(K)
    np.testing.assert_allclose(
        fusion(query, retrieved[:, order], neighbor_mask[:, order]),
        fusion(query, retrieved, neighbor_mask),
        atol=1e-5,
    )


@pytest.mark.parametrize("fusion", [make_model().image_fusion, reco.mean_fusion])
def test_masked_neighbors_are_ignored(rng, fusion):
    query, retrieved, neighbor_mask = sample_inputs(rng)
    neighbor_mask[:, 2:] = False
    other = retrieved.copy()
    other[:, 2:] = 7.0
    expected = fusion(query, retrieved[:, :2], np.ones((B, 2), bool))
    for values in (retrieved, other):
        np.testing.assert_allclose(fusion(query, values, neighbor_mask), expected, atol=1e-5)


def test_without_neighbors_the_mean_is_the_query(rng):
    query, retrieved, neighbor_mask = sample_inputs(rng)
    np.testing.assert_allclose(reco.mean_fusion(query, retrieved, ~neighbor_mask), query, atol=1e-6)


def test_the_mean_by_hand(rng):
    query, retrieved, neighbor_mask = sample_inputs(rng)
    expected = unit((query + retrieved.sum(1)) / (1 + K))
    mean = reco.mean_fusion(query, retrieved, neighbor_mask)
    np.testing.assert_allclose(mean, expected, atol=1e-6)


def batch_of(rng) -> dict[str, np.ndarray]:
    batch = {}
    for side in reco.MODALITIES:
        batch[side], batch[f"{side}_retrieved"], batch[f"{side}_neighbor_mask"] = sample_inputs(rng)
    return batch | {"class_ids": np.array([0, 0, 1, 2, -1, -1], np.int32)}


def naive_loss(model, batch, terms, is_masked) -> float:
    """The loss of docs/papers/reco.md, pair by pair, with the factor 1/2."""
    parts = {side: batch[side].astype(np.float64) for side in reco.MODALITIES}
    refined = {
        side: np.asarray(
            getattr(model, f"refine_{side}")(
                *(batch[f"{side}{part}"] for part in ("", "_retrieved", "_neighbor_mask"))
            ),
            np.float64,
        )
        for side in reco.MODALITIES
    }
    chosen = {
        "refined_refined": (refined["image"], refined["text"]),
        "refined_text": (refined["image"], parts["text"]),
        "image_refined": (parts["image"], refined["text"]),
    }
    scale = math.exp(float(model.logit_scale[...]))
    ids = batch["class_ids"]
    total = 0.0
    for a, b in (chosen[term] for term in terms):
        for i in range(B):
            others = [
                j for j in range(B) if i == j or not is_masked or ids[i] < 0 or ids[i] != ids[j]
            ]
            for left, right in ((a[i], b), (b[i], a)):
                exponents = np.array([scale * left @ right[j] for j in others])
                total += math.log(np.exp(exponents).sum()) - scale * left @ right[i]
    return total / 2 / B


@pytest.mark.parametrize("terms", [reco.LOSS_TERMS, ("refined_refined",), ("image_refined",)])
@pytest.mark.parametrize("is_masked", [True, False])
def test_the_loss_by_hand(rng, terms, is_masked):
    model, batch = make_model(loss_terms=terms, mask_same_class=is_masked), batch_of(rng)
    loss, metrics = reco.loss_fn(model, batch, jax.random.key(0))
    assert float(loss) == pytest.approx(naive_loss(model, batch, terms, is_masked), rel=1e-4)
    assert set(metrics) == {*terms, "loss", "logit_scale", "image_moved", "text_moved"}
    total, weight = metrics["loss"]
    assert float(total / weight) == pytest.approx(float(loss))


@pytest.mark.parametrize(
    ("start", "is_easy", "end"),
    [
        (20.0, True, 20.61),
        (20.0, False, 19.41),
        (100.0, True, 100),
        (100.0, False, 97.04),
        (120.0, False, 98.02),  # The first step only returns to the bound.
    ],
)
def test_the_logit_scale_follows_the_loss_up_to_its_bound(rng, start, is_easy, end):
    """Three steps of 1 %: up where image and text are equal, down where pairs are unrelated."""
    batch, model = batch_of(rng), reco.RECO(CONFIG, rngs=nnx.Rngs(params=0))
    if is_easy:  # Similar images, so that even a scale of 100 is not certain.
        batch["image"] = batch["text"] = unit(1 + 0.3 * rng.standard_normal((B, DIM)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    scale = {"logit_scale": jnp.log(jnp.float32(start))}
    config = optimizer.OptimizerConfig(learning_rate=0.01, warmup_steps=0, schedule="constant")
    tx = optimizer.make_optimizer(config, 9)
    state = tx.init(scale)

    @jax.jit
    def step(scale, state):
        def loss(scale):
            merged = nnx.merge(graphdef, params | scale, rest)
            return reco.loss_fn(merged, batch, jax.random.key(0))[0]

        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(jax.grad(loss)(scale), state, scale)
        return optax.apply_updates(scale, updates), state

    for _ in range(3):
        scale, state = step(scale, state)
    assert float(jnp.exp(scale["logit_scale"])) == pytest.approx(end, rel=1e-3)


@pytest.mark.parametrize("shape", [(4, 1, 1), (2, 2, 1), (8, 1, 1)])
def test_several_devices_equal_one(rng, shape):
    """The same loss and gradients when the batch is split; negatives come from the whole batch."""
    model = make_model()
    batch = {key: np.concatenate([value] * 4) for key, value in batch_of(rng).items()}
    for key, value in batch.items():
        if value.dtype == np.float32:
            batch[key] = value + 0.1 * rng.standard_normal(value.shape).astype(np.float32)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def compute(params, batch):
        loss = lambda p: reco.loss_fn(nnx.merge(graphdef, p, rest), batch, jax.random.key(0))[0]
        return jax.value_and_grad(loss)(params)

    alone = compute(params, batch)
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        split = jax.jit(compute)(
            jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())),
            sharding.put_batch(batch, mesh),
        )
    for ours, theirs in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_remat_changes_nothing_and_bfloat16_little(rng):
    """The loss and its gradients by float32 parameters, of two layers: one in the stack, one of its own."""
    config = dataclasses.replace(CONFIG, num_layers=2)
    params, batch = nnx.split(make_model(num_layers=2), nnx.Param, ...)[1], batch_of(rng)
    make = lambda **scale: reco.RECO(config, rngs=nnx.Rngs(params=0), **scale)
    loss = lambda model: reco.loss_fn(model, batch, jax.random.key(0))[0]
    scaled_gradients.assert_near(make, params, loss, bound=0.05)


@pytest.mark.parametrize(
    ("search", "fuse", "image", "text"),
    [
        ("uni", "cross", ("image", "text"), ("text", "image")),
        ("uni", "uni", ("image", "image"), ("text", "text")),
        ("cross", "cross", ("text", "text"), ("image", "image")),
        ("cross", "uni", ("text", "image"), ("image", "text")),
    ],
)
def test_the_four_pairs_of_search_and_fusion(search, fuse, image, text):
    """Cross-modal fusion reads the modality that the query is not (docs/papers/reco.md)."""
    lookup = reco.Lookup(search, fuse)
    assert lookup.columns("image") == image and lookup.columns("text") == text


def test_published_sizes():
    def count(config: reco.RecoConfig) -> int:
        shapes = jax.eval_shape(lambda: reco.RECO(config, rngs=nnx.Rngs(0)))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param)))

    # One layer with an MLP of 4 d has 3.152M parameters, and there are two.
    assert count(reco.RecoConfig.b32()) == pytest.approx(2 * 3.152e6, rel=1e-3)
    assert reco.RecoConfig.l14().dim == 768


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "must divide dim"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"norm_placement": "sideways"}, "pre or post"),
        ({"loss_terms": ()}, "loss_terms must be some of"),
        ({"loss_terms": ("vb_tb",)}, "loss_terms must be some of"),
        ({"initial_logit_scale": 200.0}, "at most 100"),
    ],
)
def test_invalid_configs_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_an_invalid_lookup_is_rejected():
    with pytest.raises(ValueError, match="search is uni or cross, not 'up'"):
        reco.Lookup("up")
