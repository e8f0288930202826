"""SPAE for clips: equal frames are the image tokenizer's, codes of several frames, a pyramid in time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.core.errors import UserError
from rag_mm.models.spae import autoencoder, video
from rag_mm.models.spae.spae_config import SPAEConfig
from rag_mm.models.spae.video_config import VideoConfig
from rag_mm.ops import images as image_ops

CONV = SPAEConfig(
    image_size=16,
    patch_size=2,
    width=8,
    width_multipliers=(1, 2),
    num_res_blocks=1,
    embed_dim=8,
    codebook_size=64,
    levels=(1, 2, 4, 4),
)
PATCH = dataclasses.replace(
    CONV, encoder="patch", patch_size=4, width_multipliers=(1,), num_res_blocks=0
)
CLIPS = {
    "conv": VideoConfig(CONV, time_stride=2, level_frames=(1, 1, 2, 4)),
    "patch": VideoConfig(PATCH),
}


@functools.cache
def make(config):
    """The structures of the image and the clip tokenizer, and parameters of the first, none of them zero."""
    structures = [
        nnx.split(jax.eval_shape(lambda m=m, c=c: m(c, rngs=nnx.Rngs(0))), nnx.Param)[0]
        for m, c in ((autoencoder.SPAE, config.image), (video.VideoSPAE, config))
    ]

    @jax.jit
    def init():
        model = autoencoder.SPAE(config.image, rngs=nnx.Rngs(0))
        params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
        leaves, tree = jax.tree.flatten(params)
        noise = [0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(tree, [a + b for a, b in zip(leaves, noise, strict=True)])

    return *structures, init()


@functools.cache
def call(config, is_clip, method):
    graphdef = make(config)[is_clip]
    return jax.jit(lambda params, x: getattr(nnx.merge(graphdef, params), method)(x))


def make_images(count=2):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(size=(count, 16, 16, 3)), jnp.float32)


@pytest.mark.parametrize("kind", video.INFLATIONS)
@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_of_equal_frames_is_reconstructed_as_its_image(name, kind):
    config, images = CLIPS[name], make_images()
    params = make(config)[2]
    codes = call(config, False, "encode")(params, images)
    wanted = call(config, False, "decode")(params, codes)
    assert float(jnp.std(wanted)) > 0.05
    inflated = video.inflate(params, kind)
    clip_codes = call(config, True, "encode")(inflated, jnp.repeat(images[:, None], 8, axis=1))
    found = call(config, True, "decode")(inflated, clip_codes)
    assert found.shape == (2, 8, 16, 16, 3)
    for frame in range(8):
        np.testing.assert_allclose(found[:, frame], wanted, atol=1e-5)
    start = 0
    for (frames, rows, columns), end, part in zip(
        config.grids, config.ends, np.split(codes, [1, 5, 21], axis=1), strict=True
    ):
        level = np.asarray(clip_codes)[:, start:end].reshape(2, frames, rows * columns)
        np.testing.assert_array_equal(level, np.repeat(part[:, None], frames, axis=1))
        start = end


def test_inflation_fills_the_middle_frame_or_all_three():
    params = make(CLIPS["conv"])[2]
    central, average = (video.inflate(params, kind) for kind in video.INFLATIONS)
    kernel, middle, thirds = (p["decoder"]["stem"]["kernel"] for p in (params, central, average))
    np.testing.assert_array_equal(middle[1], kernel)
    assert not middle[0].any() and not middle[2].any()
    np.testing.assert_allclose(thirds, np.broadcast_to(kernel / 3, thirds.shape), rtol=1e-6)
    np.testing.assert_array_equal(average["codebook"], params["codebook"])
    with pytest.raises(ValueError, match="central or average"):
        video.inflate(params, "middle")


def test_a_code_of_several_frames_is_the_one_that_is_nearest_to_all_of_them():
    config = VideoConfig(dataclasses.replace(PATCH, levels=(4,)), num_frames=4, level_frames=(2,))
    rng = np.random.default_rng(0)
    z, codebook = rng.normal(size=(1, 4, 4, 4, 8)), rng.normal(size=(64, 8))
    codes = video.quantize_clips(jnp.float32(z), jnp.float32(codebook), config)
    distances = ((z[..., None, :] - codebook) ** 2).sum(-1)  # [1, frames, rows, columns, codes]
    wanted = distances.reshape(1, 2, 2, 4, 4, 64).sum(2).argmin(-1)
    np.testing.assert_array_equal(codes, wanted.reshape(1, -1))


def test_any_whole_levels_can_be_decoded():
    config = VideoConfig(CONV, level_frames=(1, 2, 4, 8))
    assert config.grids == ((1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 4, 4))
    assert config.ends == [1, 9, 73, 201] and config.num_codes == 201
    codes = jnp.asarray(np.random.default_rng(0).integers(64, size=(1, 201)), jnp.int32)
    codebook = jnp.asarray(np.random.default_rng(1).normal(size=(64, 8)), jnp.float32)
    whole = video.clip_averages(codes, codebook, config)
    for level, end in enumerate(config.ends):
        part = video.clip_averages(codes[:, :end], codebook, config)
        assert len(part) == level + 1
        np.testing.assert_array_equal(part[-1], whole[level])
    with pytest.raises(ValueError, match="end inside a level"):
        video.clip_averages(codes[:, :10], codebook, config)


def test_frames_see_each_other_and_training_lowers_the_loss():
    config = CLIPS["conv"]
    graphdef, params = make(config)[1], video.inflate(make(config)[2], "average")
    rng = np.random.default_rng(0)
    still = rng.integers(256, size=(4, 1, 16, 16, 3)).astype(np.uint8)
    clips = np.stack([np.roll(still[:, 0], shift, axis=1) for shift in range(8)], axis=1)
    embed = call(config, True, "embed")
    changed = clips.copy()
    changed[:, 4] = 0
    z, other = (embed(params, image_ops.to_float(jnp.asarray(x))) for x in (clips, changed))
    assert (np.abs(z - other).max(axis=(0, 2, 3, 4)) > 1e-4).sum() > 1

    @jax.jit
    def step(params):
        loss = lambda p: video.clip_loss(
            nnx.merge(graphdef, p), {"clips": jnp.asarray(clips)}, jax.random.key(0)
        )
        grads, metrics = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), metrics

    losses = []
    for _ in range(12):
        params, metrics = step(params)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.9 * losses[0]
    assert float(metrics["code_frequencies"][0].sum()) == 4 * config.num_codes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(time_stride=3), "does not divide num_frames=8"),
        (dict(level_frames=(1, 2)), "each of the 4 levels"),
        (dict(level_frames=(1, 3, 8, 8)), "a divisor of the 8 latent frames"),
        (dict(image=dataclasses.replace(CONV, guide_dim=8)), "guide_dim=0"),
        (dict(image=dataclasses.replace(CONV, quantizer="residual")), "quantizer=average"),
    ],
    ids=str,
)
def test_what_does_not_fit_a_clip_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(VideoConfig(CONV), **change)
