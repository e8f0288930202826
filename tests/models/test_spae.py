"""SPAE: shapes and sizes, codes that do not depend on position, k-means initialization and training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scaled_gradients
from flax import nnx

from rag_mm.core import code_grids
from rag_mm.core.errors import UserError
from rag_mm.models.spae import autoencoder, objective, spae_config
from rag_mm.ops import images as image_ops
from rag_mm.ops import quantize

SIZES = dict(image_size=16, patch_size=4, width=16, num_res_blocks=1, codebook_size=64)
PATCH = dataclasses.replace(spae_config.SPAEConfig.tiny(), **SIZES, levels=(4,))
CONV = dataclasses.replace(
    PATCH,
    encoder="conv",
    patch_size=2,
    width_multipliers=(1, 2),
    levels=(1, 2, 4, 4),
    embed_dim=8,
    random_flip_rotate=False,
)
CONFIGS = pytest.mark.parametrize("config", [PATCH, CONV], ids=["patch", "conv"])


def _make_images(count, size=16, seed=0):
    """Plain backgrounds with random tiles of 4x4 pixels on the patch grid."""
    rng = np.random.default_rng(seed)
    images = np.repeat(rng.integers(256, size=(count, 1, 1, 3)), size, 1).repeat(size, 2)
    tiles = rng.integers(256, size=(200, 4, 4, 3))
    for image in images:
        for row, column in rng.integers(size // 4, size=(5, 2)) * 4:
            image[row : row + 4, column : column + 4] = tiles[rng.integers(200)]
    return images.astype(np.uint8)


@functools.cache
def _init(config):
    """Structure and initial parameters with a k-means codebook; compiled, which is much faster here."""
    images = jnp.asarray(_make_images(32))

    @jax.jit
    def init():
        model = autoencoder.SPAE(config, rngs=nnx.Rngs(0))
        model.codebook[...] = objective.init_codebook(model, images, jax.random.key(1))
        return nnx.split(model, nnx.Param)[1]

    model = jax.eval_shape(lambda: autoencoder.SPAE(config, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param)[0], init()


def _make(config):
    return nnx.merge(*_init(config))


@functools.cache
def _make_step(config):
    graphdef, _ = _init(config)
    batch = {"images": jnp.asarray(_make_images(32))}
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            return objective.loss_fn(nnx.merge(graphdef, params), batch, jax.random.key(2))

        grads, metrics = jax.grad(loss, has_aux=True)(params)
        with jax.numpy_dtype_promotion("standard"):  # Optax mixes Python floats and int32 counts.
            updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, grads, metrics

    return step, optimizer.init


def _train(config, steps):
    """The model after `steps` of Adam, the last gradients and the loss at each step."""
    graphdef, params = _init(config)
    step, init = _make_step(config)
    opt_state, losses = init(params), []
    for _ in range(steps):
        params, opt_state, grads, metrics = step(params, opt_state)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return nnx.merge(graphdef, params), grads, losses


def test_paper_size_encodes_128_pixels_into_597_codes():
    model = jax.eval_shape(lambda: autoencoder.SPAE(spae_config.SPAEConfig(), rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    images = jax.ShapeDtypeStruct((2, 128, 128, 3), jnp.float32)
    codes = jax.eval_shape(lambda p, x: nnx.merge(graphdef, p).encode(x), params, images)
    assert (codes.shape, codes.dtype) == ((2, 597), jnp.int32)
    for count in (85, 341, 597):
        prefix = jax.ShapeDtypeStruct((2, count), jnp.int32)
        decoded = jax.eval_shape(lambda p, c: nnx.merge(graphdef, p).decode(c), params, prefix)
        assert (decoded.shape, decoded.dtype) == (images.shape, images.dtype)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 50e6 < count < 65e6  # Reported: about 59M; the width of the codebook is not published.


def test_tiny_encodes_32_pixels_into_64_codes():
    config = spae_config.SPAEConfig.tiny()
    assert (config.image_size, config.num_codes, config.encoder) == (32, 64, "patch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image_size=20), "must be 16"),
        (dict(levels=(3, 4)), "pyramid"),
        (dict(encoder="vit"), "conv or patch"),
        (dict(width_multipliers=(1, 2), patch_size=2), "one scale"),
    ],
)
def test_inconsistent_configs_are_rejected(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PATCH, **change)


def test_images_that_patches_do_not_divide_are_rejected():
    with pytest.raises(UserError, match="15 x 16 pixels.*multiples of 4"):
        _make(PATCH).encode(jnp.zeros((1, 15, 16, 3)))


def test_grids_grow_with_the_image():
    config = dataclasses.replace(PATCH, levels=(2, 4))
    assert config.grids_at(16, 16) == ((2, 2), (4, 4))
    assert config.grids_at(8, 24) == ((1, 3), (2, 6))
    with pytest.raises(UserError, match=r"12 x 16 pixels .*levels=\(2, 4\); .*multiples of 8"):
        config.grids_at(12, 16)
    odd = dataclasses.replace(PATCH, image_size=24, levels=(2, 3, 6))  # strides of 3 and 2 patches
    assert odd.grids_at(24, 48) == ((2, 4), (3, 6), (6, 12))
    with pytest.raises(UserError, match="multiples of 24"):
        odd.grids_at(12, 24)


def test_a_patch_and_its_codes_decide_each_other():
    """Codes outside the changed patches stay, and codes outside a band of rows leave its embeddings alone."""
    config = dataclasses.replace(PATCH, levels=(1, 2, 4))
    model, grids = _make(PATCH), config.grids_at(16, 32)
    model.config = config
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(2, 1, 16, 32, 3)), jnp.float32)
    changed = np.zeros((16, 32), bool)
    changed[3:9, 14:17] = True
    codes = np.concatenate(
        [model.encode(jnp.where(changed[..., None], *images)), model.encode(images[1])]
    )
    may_differ = code_grids.mask_of_pixels(changed, grids)
    assert (codes[0] != codes[1])[may_differ].sum() >= 3
    np.testing.assert_array_equal(codes[0][~may_differ], codes[1][~may_differ])
    refilled = codes[0].copy()
    for start, end in code_grids.ranges_of_rows(grids, 16, 4, 12):
        refilled[start:end] = rng.integers(64, size=end - start)
    averages = quantize.running_averages(
        np.stack([codes[0], refilled]), model.codebook[...], grids
    )[-1]
    assert (averages[0, 1:3] != averages[1, 1:3]).any(axis=-1).mean() > 0.9
    for rows in (slice(0, 1), slice(3, 4)):
        np.testing.assert_array_equal(averages[0, rows], averages[1, rows])


def test_patches_fold_into_channels_and_back():
    images = jnp.asarray(_make_images(2))
    folded = autoencoder.conv.space_to_depth(images, 4)
    np.testing.assert_array_equal(folded[1, 2, 3], images[1, 8:12, 12:16].reshape(-1))
    np.testing.assert_array_equal(autoencoder.conv.depth_to_space(folded, 4), images)


def test_codes_of_a_crop_do_not_depend_on_its_position_on_the_patch_grid():
    """Copying a retrieved image is copying codes only if this holds exactly."""
    config = dataclasses.replace(spae_config.SPAEConfig.tiny(), codebook_size=512)
    art = np.random.default_rng(0).integers(256, size=(32, 24, 24, 3))  # the cards of level `easy`
    positions = [(0, 0, 30), (0, 8, 200), (8, 0, 90), (8, 8, 0)]
    scenes = np.empty((4, 32, 32, 32, 3), np.uint8)
    for scene, (row, column, color) in zip(scenes, positions, strict=True):
        scene[:] = color
        scene[:, row : row + 24, column : column + 24] = art

    @jax.jit
    def encode(scenes):
        model = autoencoder.SPAE(config, rngs=nnx.Rngs(0))
        graphdef, params = nnx.split(model, nnx.Param)
        # A new model passes pixels through; noise makes every layer contribute.
        leaves, treedef = jax.tree.flatten(params)
        leaves = [
            leaf + 0.1 * jax.random.normal(jax.random.key(i), leaf.shape)
            for i, leaf in enumerate(leaves)
        ]
        model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        patches = model.embed(image_ops.to_float(scenes[0]))[:, :6, :6].reshape(
            -1, config.embed_dim
        )
        model.codebook[...] = patches[: config.codebook_size]
        return [model.encode(image_ops.to_float(scene)).reshape(-1, 8, 8) for scene in scenes]

    codes = [
        np.asarray(grid)[:, row // 4 : row // 4 + 6, column // 4 : column // 4 + 6]
        for grid, (row, column, _) in zip(encode(scenes), positions, strict=True)
    ]
    assert len(np.unique(codes[0])) == config.codebook_size
    for other in codes[1:]:
        np.testing.assert_array_equal(other, codes[0])


def test_codes_do_not_depend_on_the_batch():
    model, _, _ = _train(PATCH, 5)
    images = image_ops.to_float(jnp.asarray(_make_images(32)))
    alone = jnp.concatenate([model.encode(image[None]) for image in images[:4]])
    np.testing.assert_array_equal(alone, model.encode(images)[:4])


@CONFIGS
def test_thirty_steps_lower_the_loss(config):
    _, _, losses = _train(config, 30)
    assert losses[-1] < 0.9 * losses[0]


def test_a_new_patch_tokenizer_is_kmeans_on_pixels():
    """Before training, it reconstructs each patch as its nearest k-means center."""
    model = _make(PATCH)
    images = image_ops.to_float(jnp.asarray(_make_images(32)))
    patches = autoencoder.conv.space_to_depth(images, 4)
    np.testing.assert_array_equal(model.embed(images), patches)
    codes = quantize.nearest_codes(patches, model.codebook[...])
    centers = autoencoder.conv.depth_to_space(model.codebook[...][codes], 4)
    np.testing.assert_allclose(model.decode(model.encode(images)), centers, atol=1e-6)


@CONFIGS
def test_kmeans_initialization_uses_most_codes(config):
    model = _make(config)
    images = image_ops.to_float(jnp.asarray(_make_images(32)))
    codes = quantize.nearest_codes(model.embed(images), model.codebook[...])
    counts = quantize.code_counts(codes, config.codebook_size)
    assert float(quantize.usage(counts)) > 0.6


@CONFIGS
def test_gradients_reach_encoder_codebook_and_decoder(config):
    _, grads, _ = _train(config, 4)  # at first, zero-initialized last layers block gradients
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(grad).all() and grad.any(), jax.tree_util.keystr(path)


def test_metrics_are_sums_with_weights_over_the_decoded_images():
    """The straight-through estimator changes only gradients: the loss is that of decode(encode)."""
    graphdef, params = nnx.split(_train(CONV, 3)[0])
    pixels = jnp.asarray(_make_images(8))

    @jax.jit
    def measure(params):
        model, images = nnx.merge(graphdef, params), image_ops.to_float(pixels)
        loss, metrics = objective.loss_fn(model, {"images": pixels}, jax.random.key(0))
        return loss, metrics, jnp.sum((model.decode(model.encode(images)) - images) ** 2)

    loss, metrics, squared_error = measure(params)
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["squared_error"][0], squared_error, rtol=1e-5)
    assert metrics["squared_error"][1] == pixels.size
    counts, total = metrics["code_frequencies"]
    assert counts.shape == (4, CONV.codebook_size)
    assert counts.sum(axis=1).tolist() == [8 * side**2 for side in CONV.levels]
    assert float(total) == 8 * CONV.num_codes
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((loss, metrics)))


def test_psnr_of_a_mean_squared_error():
    assert objective.psnr(0.01) == pytest.approx(20.0)


def test_same_seed_same_bits():
    first, second = (nnx.split(_train(PATCH, 3)[0])[1] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


# 256 pixels as 256 codes of 8,192.
LARGE = spae_config.SPAEConfig(
    image_size=256, width_multipliers=(1, 2, 2, 4, 4), num_res_blocks=1, levels=(16,)
)


def _temporary_bytes(call, *shape):
    """Temporary memory of call(model, images uint8 `shape`) for the large model; nothing runs."""
    model = jax.eval_shape(lambda: autoencoder.SPAE(LARGE, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model, nnx.Param)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    program = jax.jit(lambda params, images: call(nnx.merge(graphdef, params), images))
    return program.lower(params, images).compile().memory_analysis().temp_size_in_bytes


def test_a_batch_of_large_images_is_encoded_in_two_gibibytes():
    batch = image_ops.num_at_once(LARGE.image_size)
    encode = lambda model, images: model.encode(image_ops.to_float(images))
    assert _temporary_bytes(encode, batch, 256, 256, 3) < 2**31


def test_kmeans_of_many_large_images_starts_in_two_gibibytes():
    init = lambda model, images: objective.init_codebook(model, images, jax.random.key(0))
    assert _temporary_bytes(init, 2048, 256, 256, 3) < 2**31


@pytest.mark.slow
@CONFIGS
def test_remat_changes_nothing_and_bfloat16_little(config):
    """Of the networks: codes near a boundary may differ. Gradients are by float32 parameters."""
    images = image_ops.to_float(jnp.asarray(_make_images(4)))

    def make(**scale):
        return autoencoder.SPAE(config, rngs=nnx.Rngs(params=0), **scale)

    params = nnx.to_pure_dict(nnx.split(jax.jit(make)(), nnx.Param)[1])
    rng = np.random.default_rng(0)  # A new patch encoder is exact, and its blocks are zero.
    noisy = lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype(np.float32)
    params = jax.tree.map(noisy, params)
    loss = lambda model: jnp.square(model.render(model.embed(images)) - images).mean()
    scaled_gradients.assert_near(make, params, loss, bound=0.1)
