"""CLIP: published sizes, unit embeddings, pooling at the end of text, and training on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scaled_gradients
from flax import nnx

from rag_mm.core import sharding
from rag_mm.models import clip
from rag_mm.nn import param_trees
from rag_mm.train import optimizer as optimizer_lib
from rag_mm.train import train_state, train_step

END = 11
TINY = clip.CLIPConfig(
    image_size=8,
    patch_size=4,
    vision=clip.TowerConfig(16, 1, 2, 32),
    text=clip.TowerConfig(8, 1, 2, 16),
    vocab_size=12,
    max_text_len=6,
    end_of_text=END,
    projection_dim=8,
)
VIT_L_14 = clip.CLIPConfig(
    image_size=224,
    patch_size=14,
    vision=clip.TowerConfig(1024, 24, 16, 4096),
    text=clip.TowerConfig(768, 12, 12, 3072),
    vocab_size=49_408,
    max_text_len=77,
    end_of_text=49_407,
    projection_dim=768,
)


def make_model(config=TINY):
    return clip.CLIP(config, rngs=nnx.Rngs(params=0))


def batch_of(size, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(END, size=(size, 6)).astype(np.int32)
    tokens[np.arange(size), rng.integers(1, 6, size)] = END
    return {"images": rng.random((size, 8, 8, 3)).astype(np.float32), "tokens": tokens}


@pytest.fixture(scope="module")
def model():
    """Structure and random parameters from NumPy, since compiling `init_params` takes seconds."""
    graphdef, abstract = param_trees.describe(make_model, None)
    rng = np.random.default_rng(0)

    def sample(path, leaf):
        scale = 1 / np.sqrt(np.prod(leaf.shape[1:-1]) or 1)
        mean = 1.0 if path[-1].key == "scale" else 0.0
        if path[-1].key == "logit_scale":
            return np.log(np.float32(10))
        return rng.normal(mean, 0.3 * scale, leaf.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(sample, abstract)
    return graphdef, jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def encode(model):
    graphdef, params = model

    @functools.partial(jax.jit, static_argnums=0)
    def call(method, params, x):
        return getattr(nnx.merge(graphdef, params), method)(x)

    return {
        "image": lambda x: np.asarray(call("encode_image", params, x)),
        "text": lambda x: np.asarray(call("encode_text", params, x)),
    }


def test_vit_l_14_has_the_published_size():
    graphdef, params = param_trees.describe(lambda: make_model(VIT_L_14), None)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 427_616_513
    call = lambda method: lambda p, x: getattr(nnx.merge(graphdef, p), method)(x)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((2, 77), jnp.int32)
    for method, x in {"encode_image": images, "encode_text": tokens}.items():
        out = jax.eval_shape(call(method), params, x)
        assert (out.shape, out.dtype) == ((2, 768), jnp.float32)
    features = jax.eval_shape(lambda p, x: nnx.merge(graphdef, p).vision(x), params, images)
    assert features.shape == (2, 1024)
    assert params["vision"]["position_embedding"].shape == (257, 1024)


def test_embeddings_have_unit_norm_and_differ(encode):
    batch = batch_of(8)
    for embeddings in (encode["image"](batch["images"]), encode["text"](batch["tokens"])):
        assert (embeddings.shape, embeddings.dtype) == ((8, 8), np.float32)
        np.testing.assert_allclose((embeddings**2).sum(1), 1, atol=1e-5)
        assert (embeddings @ embeddings.T)[~np.eye(8, dtype=bool)].max() < 1 - 1e-6


def test_embeddings_do_not_depend_on_the_batch(encode):
    batch = batch_of(8)
    for side, name in (("image", "images"), ("text", "tokens")):
        whole, alone = encode[side](batch[name]), encode[side](batch[name][3:4])
        np.testing.assert_allclose(whole[3:4], alone, atol=1e-6)


def test_tokens_after_the_first_end_of_text_are_ignored(encode):
    tokens = np.array([[3, 4, END, 0, 0, 0]], np.int32)
    embedding = encode["text"](tokens)
    for after in ([1, 2, 3], [END, END, END], [5, END, 5]):
        tokens[0, 3:] = after
        np.testing.assert_array_equal(encode["text"](tokens), embedding)
    tokens[0, 0] = 5
    assert np.abs(encode["text"](tokens) - embedding).max() > 1e-3


def test_all_tokens_are_returned_where_asked(model, encode):
    """The class token, and the token that `pooling` selects, have the embedding of the whole."""
    graphdef, params = model
    batch = batch_of(4)

    @jax.jit
    def tokens(params, images, texts):
        made = nnx.merge(graphdef, params)
        return made.encode_image_tokens(images), made.encode_text_tokens(texts)

    images, texts = tokens(params, batch["images"], batch["tokens"])
    assert images.shape == (4, 5, 8) and texts.shape == (4, 6, 8)
    np.testing.assert_allclose(images[:, 0], encode["image"](batch["images"]), atol=1e-6)
    ends = (batch["tokens"] == END).argmax(axis=1)
    found = np.asarray(texts)[np.arange(4), ends]
    np.testing.assert_allclose(found, encode["text"](batch["tokens"]), atol=1e-6)
    assert np.abs(images[:, 1:] - images[:, :1]).max() > 0.1


def test_patches_are_read_in_raster_order(model):
    """The patch projection is the published convolution: kernel [row, column, channel]."""
    graphdef, params = model
    image = np.random.default_rng(1).random((1, 8, 8, 3)).astype(np.float32)
    config, vision = TINY, params["vision"]
    normal = (image[0] - np.array(config.image_mean)) / np.array(config.image_std)
    expected = [
        normal[r : r + 4, c : c + 4].reshape(-1) @ vision["patches"]["kernel"]
        for r in (0, 4)
        for c in (0, 4)
    ]
    expected = np.stack([vision["class_embedding"], *expected]) + vision["position_embedding"]
    inputs = []

    class Spy:
        def __call__(self, x):
            inputs.append(np.asarray(x))
            return x

    tower = nnx.merge(graphdef, params).vision
    tower.pre_norm = Spy()
    tower.stack = lambda x, positions, attend: (x, None)
    tower.post_norm = lambda x: x
    tower(jnp.asarray(image))
    np.testing.assert_allclose(inputs[0][0], expected, atol=1e-5)


@pytest.fixture(scope="module")
def alone(model):
    losses, _ = train(sharding.make_mesh(), model[1], batch_of(8, seed=2), 20)
    return losses


def train(mesh, params, batch, steps):
    """Metrics of Adam steps on one batch, and the final state."""
    graphdef, abstract = param_trees.describe(make_model, mesh)
    placed = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    # Copied: a step donates its state, and a shard on one device may be the caller's array.
    placed = jax.tree.map(jnp.copy, placed)
    optimizer = optax.adam(1e-2)
    state = train_state.init_state(placed, optimizer, mesh)
    step = train_step.make_train_step(graphdef, clip.loss_fn, optimizer, 0)
    losses = []
    with jax.set_mesh(mesh):
        batch = sharding.put_batch(batch, mesh)
        for _ in range(steps):
            state, metrics = step(state, batch)
            losses.append({k: float(total / weight) for k, (total, weight) in metrics.items()})
    return losses, state


def test_twenty_steps_learn_one_batch(alone):
    assert alone[-1]["loss"] < 0.5 * alone[0]["loss"]
    assert alone[-1]["in_batch_recall"] > alone[0]["in_batch_recall"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (4, 2, 1), (2, 2, 2)], ids=["8", "4x2x1", "2x2x2"])
def test_training_on_eight_devices_equals_training_on_one(model, alone, shape):
    eight, state = train(sharding.make_mesh(*shape), model[1], batch_of(8, seed=2), 3)
    for one, other in zip(alone, eight, strict=False):
        assert one == pytest.approx(other, abs=1e-4)
    kernel = state.params["vision"]["patches"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp")


def test_the_loss_on_a_mesh_equals_that_on_one_device(model):
    """Only the forward pass on 2x2x2 devices, which compiles fast enough for every run."""
    graphdef, params = model
    mesh, batch = sharding.make_mesh(2, 2, 2), batch_of(8, seed=2)
    _, abstract = param_trees.describe(make_model, mesh)
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, abstract)

    @jax.jit
    def loss(params, batch):
        return clip.loss_fn(nnx.merge(graphdef, params), batch, jax.random.key(0))[0]

    with jax.set_mesh(mesh):
        sharded = loss(placed, sharding.put_batch(batch, mesh))
    np.testing.assert_allclose(sharded, loss(params, batch), rtol=1e-5)


@pytest.mark.slow
def test_remat_changes_nothing_and_bfloat16_little(model):
    """The loss and its gradients by float32 parameters."""
    _, params = model
    batch = jax.tree.map(jnp.asarray, batch_of(8, seed=2))
    make = lambda **scale: clip.CLIP(TINY, rngs=nnx.Rngs(params=0), **scale)
    loss = lambda model: clip.loss_fn(model, batch, jax.random.key(0))[0]
    scaled_gradients.assert_near(make, params, loss, bound=0.05)


class IdentityCLIP(clip.CLIP):
    """Encoders that return their input."""

    def __init__(self, scale):
        self.logit_scale = nnx.Param(jnp.log(jnp.float32(scale)))

    def encode_image(self, images):
        return images

    encode_text = encode_image


def test_the_loss_of_perfect_pairs():
    """Similarities are 1 for pairs, else 0."""
    batch = {"images": jnp.eye(4), "tokens": jnp.eye(4)}
    loss, metrics = clip.loss_fn(IdentityCLIP(2.0), batch, jax.random.key(0))
    np.testing.assert_allclose(metrics["logit_scale"][0], 2, rtol=1e-5)
    np.testing.assert_allclose(loss, np.log(1 + 3 * np.exp(-2)), rtol=1e-5)
    assert metrics["in_batch_recall"][0] == metrics["in_batch_recall"][1] == 4.0


@pytest.mark.parametrize("start", [100.0, 120.0])
def test_a_loss_that_is_too_sure_lowers_the_temperature_from_its_bound_and_above(start):
    """Every text matches another image than its own, so a scale of zero would be best."""
    batch = {"images": jnp.eye(4), "tokens": jnp.roll(jnp.eye(4), 1, axis=0)}
    graphdef, params = nnx.split(IdentityCLIP(start), nnx.Param)
    params = nnx.to_pure_dict(params)
    config = optimizer_lib.OptimizerConfig(
        learning_rate=0.1, warmup_steps=0, schedule="constant", clip_norm=1e9
    )
    tx = optimizer_lib.make_optimizer(config, 9)
    state = tx.init(params)
    for _ in range(3):
        loss = lambda p: clip.loss_fn(nnx.merge(graphdef, p), batch, jax.random.key(0))[0]
        grads = jax.grad(loss)(params)
        # The loss is about the scale itself, whose derivative by its logarithm is the scale.
        assert float(grads["logit_scale"]) == pytest.approx(np.exp(params["logit_scale"]), rel=1e-3)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert np.exp(params["logit_scale"]) < 85


def test_a_start_above_the_bound_is_refused():
    with pytest.raises(ValueError, match="initial_logit_scale is 120"):
        dataclasses.replace(clip.CLIPConfig.b32(), initial_logit_scale=120.0)
