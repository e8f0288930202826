"""The visual decoder learns to draw what its condition says, on one device as on eight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rag_mm.core import sharding
from rag_mm.models.emu import visual_decoder
from rag_mm.models.emu.dit import DiTConfig
from rag_mm.models.emu.visual_decoder import VisualDecoder, VisualDecoderConfig
from rag_mm.nn import param_trees

CONFIG = VisualDecoderConfig(
    2, 6, DiTConfig(8, 3, 4, num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64)
)
COLORS = np.array([[200, 40, 40], [30, 60, 220], [30, 180, 60], [220, 220, 60]], np.uint8)


def make(config=CONFIG):
    return VisualDecoder(config, rngs=nnx.Rngs(0))


def conditions(number):
    """Codes of plain images, one for each colour, far from mean 0 and deviation 1."""
    return (5 + 3 * np.random.default_rng(1).normal(size=(4, 2, 6)))[number].astype(np.float32)


def make_batch(count, seed=0):
    number = np.random.default_rng(seed).integers(4, size=count)
    images = np.broadcast_to(COLORS[number][:, None, None], (count, 8, 8, 3))
    return {"images": images.copy(), "condition": conditions(number)}


@pytest.fixture(scope="module")
def untrained():
    graphdef, params = nnx.split(make(), nnx.Param)
    null = np.full((2, 6), 5, np.float32)
    fitted = visual_decoder.fit(nnx.to_pure_dict(params), conditions(np.arange(4)), null)
    return graphdef, fitted


@pytest.fixture(scope="module")
def trained(untrained):
    graphdef, params = untrained
    held, free = param_trees.split(params, visual_decoder.is_fitted)
    tx = optax.adam(3e-3)

    @jax.jit
    def step(free, opt, batch, key):
        def loss(free):
            model = nnx.merge(graphdef, param_trees.join(free, held))
            return visual_decoder.loss_fn(model, batch, key)

        grads, metrics = jax.grad(loss, has_aux=True)(free)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt = tx.update(grads, opt)
        return optax.apply_updates(free, updates), opt, metrics

    opt = tx.init(free)
    for i in range(300):
        free, opt, metrics = step(free, opt, make_batch(32, i), jax.random.key(i))
    return graphdef, param_trees.join(free, held), metrics


def test_it_draws_the_colour_of_a_condition_and_any_colour_of_none(trained):
    graphdef, params, _ = trained
    draw = partial(visual_decoder.draw, params, graphdef=graphdef, config=CONFIG)
    number, seeds = np.repeat(np.arange(4), 4), np.arange(16, dtype=np.uint32)
    nearest = lambda images: np.abs(
        np.asarray(images, np.float32).mean((1, 2))[:, None] - COLORS.astype(np.float32)
    ).sum(-1)
    for method, guidance in (("ddim", None), ("pndm", 1.0)):
        images = draw(conditions(number), seeds, guidance=guidance, method=method)
        distances = nearest(images)
        np.testing.assert_array_equal(distances.argmin(1), number)
        assert distances.min(1).max() < 90, (method, distances.min(1))
    null = np.broadcast_to(np.asarray(params["null"]), (16, 2, 6))
    assert len(set(nearest(draw(null, seeds)).argmin(1))) > 1


def test_metrics_tell_images_with_and_without_condition(trained):
    _, _, metrics = trained
    mean = {name: float(total) / max(float(weight), 1) for name, (total, weight) in metrics.items()}
    assert float(metrics["loss"][1]) == 32
    halves = [("loss_given", "loss_null"), ("loss_clean", "loss_noisy")]
    for a, b in halves:
        both = sum(float(metrics[name][0]) for name in (a, b))
        np.testing.assert_allclose(both, float(metrics["loss"][0]), rtol=1e-5)
    assert 0 < mean["loss"] < 0.3 and 0 < mean["image_mse"] < 1


def test_an_image_depends_on_its_own_seed_and_condition_only(trained):
    graphdef, params, _ = trained
    draw = partial(visual_decoder.draw, params, graphdef=graphdef, config=CONFIG, num_steps=3)
    given, seeds = conditions(np.array([0, 1, 2])), np.array([7, 8, 9], np.uint32)
    all_three = np.asarray(draw(given, seeds), int)
    other = given.copy()
    other[0] += 3
    again = np.asarray(draw(other[::-1], seeds[::-1]), int)[::-1]
    assert np.abs(all_three[1:] - again[1:]).max() <= 1
    assert np.abs(all_three[0] - again[0]).max() > 1
    moved = np.asarray(draw(given, seeds + np.uint32(1)), int)
    assert np.abs(moved - all_three).max() > 1


def test_loss_and_images_are_those_of_one_device_on_eight(untrained):
    graphdef, params = untrained
    params = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(3), x.shape), params
    )
    run = jax.jit(lambda p, b: visual_decoder.loss_fn(nnx.merge(graphdef, p), b, jax.random.key(0)))
    grads = jax.jit(jax.grad(lambda p, b: run(p, b)[0]))
    batch, mesh = make_batch(8), sharding.make_mesh(2, 2, 2)
    plain, expected = run(params, batch), grads(params, batch)
    layout = param_trees.describe(make, mesh)[1]
    placed = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), params, layout)
    seeds = np.arange(8, dtype=np.uint32)
    draw = partial(visual_decoder.draw, graphdef=graphdef, config=CONFIG, num_steps=2)
    images = np.asarray(draw(params, batch["condition"], seeds), int)
    with jax.set_mesh(mesh):
        put = sharding.put_batch(batch | {"seeds": seeds}, mesh)
        found = run(placed, {name: put[name] for name in batch})
        np.testing.assert_allclose(found[0], plain[0], rtol=1e-5)
        for name, pair in plain[1].items():
            np.testing.assert_allclose(found[1][name], pair, rtol=1e-4, err_msg=name)
        split = grads(placed, {name: put[name] for name in batch})
        drawn = np.asarray(draw(placed, put["condition"], put["seeds"]), int)
    assert np.abs(drawn - images).max() <= 1
    for (path, a), b in zip(
        param_trees.leaves_by_path(split).items(), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=path)


def test_the_null_condition_takes_the_place_of_a_dropped_one(untrained):
    graphdef, params = untrained
    params = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(3), x.shape), params
    )
    model = nnx.merge(graphdef, params)
    batch = make_batch(4)
    given = model.drop(jnp.asarray(batch["condition"]), jnp.array([True, False, True, False]))
    np.testing.assert_array_equal(given[0], params["null"])
    np.testing.assert_array_equal(given[1], batch["condition"][1])
    every = nnx.merge(
        nnx.graphdef(make(VisualDecoderConfig(2, 6, CONFIG.dit, drop_rate=1.0))), params
    )
    losses = [
        float(visual_decoder.loss_fn(every, batch | {"condition": each}, jax.random.key(1))[0])
        for each in (batch["condition"], batch["condition"][::-1].copy())
    ]
    assert losses[0] == losses[1]


def test_what_does_not_fit_is_refused(untrained):
    _, params = untrained
    with pytest.raises(ValueError, match=r"conditions are \(2, 5\), but the model takes \(2, 6\)"):
        visual_decoder.fit(params, conditions(np.arange(4))[:, :, :5], np.zeros((2, 5)))
    for wrong in (dict(method="ddpm"), dict(drop_rate=2.0), dict(num_steps=0), dict(time_power=0)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            VisualDecoderConfig(2, 6, **wrong)


def test_the_unet_draws_by_latents_and_trains_without_its_autoencoder():
    config = VisualDecoderConfig.tiny()
    model = make(config)
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.integers(256, size=(2, 16, 16, 3), dtype=np.uint8),
        "condition": rng.normal(size=(2, 2, 6)).astype(np.float32),
    }
    loss = lambda p, b: visual_decoder.loss_fn(nnx.merge(graphdef, p), b, jax.random.key(0))
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
    assert 0.5 < float(value) < 5 and float(metrics["loss"][1]) == 2
    norms = {path: float(jnp.abs(x).max()) for path, x in param_trees.leaves_by_path(grads).items()}
    assert all((size > 0) != visual_decoder.is_fitted(path) for path, size in norms.items()), norms
    seeds = np.arange(2, dtype=np.uint32)
    images = visual_decoder.draw(
        params, batch["condition"], seeds, graphdef=graphdef, config=config
    )
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8


def test_the_papers_sizes_need_no_memory_to_be_told():
    config = VisualDecoderConfig.sd15()
    shapes = param_trees.leaves_by_path(param_trees.describe(lambda: make(config), None)[1])
    count = lambda part: sum(x.size for path, x in shapes.items() if path.startswith(part))
    assert config.image_size == 512 and config.noisy_shape == (64, 64, 4)
    assert count("vae/") == 83_653_863
    # The published U-Net, and keys and values of 5,120 instead of 768 inputs at each of 16 transformers.
    widths = sum(5 * [320] + 5 * [640] + 6 * [1280])
    assert count("network/") == 859_520_964 + 2 * (5120 - 768) * widths
    with pytest.raises(ValueError, match="the network denoises 64 x 64 places of 4 channels"):
        VisualDecoderConfig(2, 6, unet=config.unet)
