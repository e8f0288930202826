"""SPAE for clips: an image tokenizer inflated to three dimensions, with a pyramid of codes in time.

Every 3x3 convolution becomes one of 3x3x3; normalization is over the clip; before the first frame and after
the last one, edge frames are repeated. So a clip of equal frames is to an inflated network what its frame is
to the image network. Frames are folded into the batch, and a convolution over time is one over the channels
of three frames, so that the networks are those of the image tokenizer. Where the paper's video model halves
time between scales, here latent frames are means over `time_stride` frames, repeated before the decoder.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Int32, Key

from rag_mm.core import code_grids, sharding
from rag_mm.models.objective_types import Batch, Metrics
from rag_mm.models.spae import autoencoder, networks
from rag_mm.models.spae.video_config import VideoConfig
from rag_mm.nn import conv
from rag_mm.nn.param_trees import Params
from rag_mm.ops import images as image_ops
from rag_mm.ops import quantize

INFLATIONS = ("central", "average")


class ClipConv(nnx.Module):
    """A 3x3x3 convolution of clips whose frames are folded into the batch."""

    def __init__(self, image_conv: nnx.Conv, num_frames: int):
        """Takes the place of `image_conv`, inflated centrally; clips have `num_frames`."""
        self.num_frames = num_frames
        self.kernel = nnx.Param(_inflate_kernel(image_conv.kernel[...], "central"))
        has_bias = image_conv.bias is not None
        self.bias = nnx.Param(image_conv.bias[...]) if has_bias else None

    def __call__(self, x: Float[Array, "N H W in_dim"]) -> Float[Array, "N H W out_dim"]:
        """N = clips x frames."""
        clips = x.reshape(-1, self.num_frames, *x.shape[1:])
        before = jnp.concatenate([clips[:, :1], clips[:, :-1]], axis=1)
        after = jnp.concatenate([clips[:, 1:], clips[:, -1:]], axis=1)
        three = jnp.concatenate([before, clips, after], axis=-1).reshape(*x.shape[:-1], -1)
        _, rows, columns, in_dim, out_dim = self.kernel.shape
        kernel = jnp.moveaxis(self.kernel[...], 0, 2).reshape(rows, columns, 3 * in_dim, out_dim)
        y = conv.convolve3x3(three, kernel)
        return y if self.bias is None else y + self.bias[...][None, None, None]


class ClipNorm(nnx.Module):
    """GroupNorm over all frames of a clip, which are folded into the batch."""

    def __init__(self, image_norm: conv.ImageNorm, num_frames: int):
        """Takes the place of `image_norm`; clips have `num_frames`."""
        self.num_frames, self.num_groups = num_frames, image_norm.num_groups
        self.epsilon = image_norm.epsilon
        self.scale, self.bias = nnx.Param(image_norm.scale[...]), nnx.Param(image_norm.bias[...])

    def __call__(self, x: Float[Array, "N H W D"]) -> Float[Array, "N H W D"]:
        """N = clips x frames."""
        clips = x.reshape(-1, self.num_frames * x.shape[1], *x.shape[2:])
        scale, bias = self.scale[...], self.bias[...]
        return conv.group_normalize(clips, scale, bias, self.num_groups, self.epsilon).reshape(
            x.shape
        )


def inflate(params: Params, kind: str) -> Params:
    """A clip tokenizer's parameters from those of an image tokenizer.

    Args:
        params: of `autoencoder.SPAE`.
        kind: central: an image kernel is the middle frame's, others are zero; average: it is a third of it in
            each of the three frames.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in INFLATIONS:
        raise ValueError(f"inflation is central or average, not {kind!r}")
    return jax.tree.map(
        lambda leaf: _inflate_kernel(leaf, kind) if leaf.ndim == 4 else leaf, params
    )


def _inflate_kernel(
    kernel: Float[Array, "3 3 in_dim out_dim"], kind: str
) -> Float[Array, "3 3 3 in_dim out_dim"]:
    shares = (0, 1, 0) if kind == "central" else (1 / 3, 1 / 3, 1 / 3)
    return jnp.stack([jnp.asarray(share, kernel.dtype) * kernel for share in shares])


class VideoSPAE(nnx.Module):
    """Clips to a pyramid of codes and back; frames are RGB in 0..1."""

    def __init__(
        self,
        config: VideoConfig,
        *,
        rngs: nnx.Rngs,
        dtype: str = "float32",
        remat: str = "none",
    ):
        """`dtype` and `remat` as for `autoencoder.SPAE`; parameters have its paths."""
        self.config, self.dtype = config, dtype
        image = autoencoder.SPAE(config.image, rngs=rngs, dtype=dtype, remat=remat)
        self.encoder = _over_time(image.encoder, config.num_frames)
        self.decoder = _over_time(image.decoder, config.num_frames)
        self.codebook = image.codebook

    @sharding.automatic("batch")
    def embed(self, clips: Float32[Array, "B T H W 3"]) -> Float32[Array, "B L R S D"]:
        """Embeddings of the L latent frames before quantization; D is embed_dim."""
        c = self.config
        patches = conv.space_to_depth(clips.reshape(-1, *clips.shape[2:]), c.image.patch_size)
        z = networks.run_in(self.dtype, self.encoder, patches)
        return z.reshape(len(clips), c.num_latents, c.time_stride, *z.shape[1:]).mean(axis=2)

    @sharding.automatic("batch")
    def render(self, z: Float32[Array, "B L R S D"]) -> Float32[Array, "B T H W 3"]:
        """Clips, not clipped to 0..1, from embeddings of the latent frames."""
        c = self.config
        frames = jnp.repeat(z, c.time_stride, axis=1).reshape(-1, *z.shape[2:])
        patches = networks.run_in(self.dtype, self.decoder, frames)
        images = conv.depth_to_space(patches, c.image.patch_size)
        return images.reshape(len(z), c.num_frames, *images.shape[1:])

    @sharding.automatic("batch")
    def encode(self, clips: Float32[Array, "B T H W 3"]) -> Int[Array, "B C"]:
        """int32 codes, coarsest level first, within a level by frame and then in raster order."""
        return quantize_clips(self.embed(clips), self.codebook[...], self.config)

    @sharding.automatic("batch")
    def decode(self, codes: Int[Array, "B C"]) -> Float32[Array, "B T H W 3"]:
        """Clips in 0..1 from the codes of all levels, or of the first few."""
        averages = clip_averages(codes, self.codebook[...], self.config)
        return jnp.clip(self.render(averages[-1]), 0, 1)


def _over_time(network: nnx.Module, num_frames: int) -> nnx.Module:
    """The network with each 3x3 convolution and GroupNorm replaced, at any depth."""
    made = {nnx.Conv: ClipConv, conv.ImageNorm: ClipNorm}
    for _, parent in list(nnx.iter_modules(network)):
        for name, part in list(vars(parent).items()):
            if type(part) in made:
                setattr(parent, name, made[type(part)](part, num_frames))
            elif isinstance(part, nnx.List):
                for index, item in enumerate(part):
                    if type(item) in made:
                        part[index] = made[type(item)](item, num_frames)
    return network


def quantize_clips(
    z: Float[Array, "B L R S D"], codebook: Float[Array, "C D"], config: VideoConfig
) -> Int32[Array, "B num_codes"]:
    """The codes of every level by streaming average quantization (`quantize.quantize`); passes no gradient.

    A code of several latent frames is the nearest one to the mean of what these frames still need, which
    minimizes the sum of their squared distances.
    """
    z, codebook = jax.lax.stop_gradient((z, codebook))
    sums, codes, counts = jnp.zeros_like(z), [], quantize.word_counts(config.image_grids)
    for (frames, *grid), count in zip(config.grids, counts, strict=True):
        rows, columns = _places((grid[0], grid[1]), config)
        number = count[rows, columns].astype(np.float32)[None, None, :, :, None]
        target = number * z[:, :, rows, columns] - sums[:, :, rows, columns]
        shape = (len(z), frames, -1, *target.shape[2:])
        found = quantize.nearest_codes(target.reshape(shape).mean(axis=2), codebook)
        sums = sums.at[:, :, rows, columns].add(_vectors(found, codebook, config))
        codes.append(found.reshape(len(z), -1))
    return jnp.concatenate(codes, axis=1)


def clip_averages(
    codes: Int[Array, "B num_codes"], codebook: Float[Array, "C D"], config: VideoConfig
) -> list[Float[Array, "B L R S D"]]:
    """The mean of the vectors that each position has after each level of `codes`, zero where it has none.

    Raises:
        ValueError: `codes` ends inside a level.
    """
    if codes.shape[1] not in config.ends:
        raise ValueError(f"{codes.shape[1]} codes end inside a level; levels end at {config.ends}")
    shape = (codes.shape[0], config.num_latents, *config.image_grids[-1], codebook.shape[1])
    sums, averages = jnp.zeros(shape, codebook.dtype), []
    counts = quantize.word_counts(config.image_grids)
    for (frames, *grid), end, count in zip(config.grids, config.ends, counts, strict=True):
        if end > codes.shape[1]:
            break
        level = codes[:, end - frames * grid[0] * grid[1] : end].reshape(-1, frames, *grid)
        rows, columns = _places((grid[0], grid[1]), config)
        sums = sums.at[:, :, rows, columns].add(_vectors(level, codebook, config))
        total = np.maximum(count, 1).astype(np.float32)[None, None, :, :, None]
        averages.append(sums / total)
    return averages


def _vectors(
    codes: Int[Array, "B frames r s"], codebook: Float[Array, "C D"], config: VideoConfig
) -> Float[Array, "B L r s D"]:
    """The vector of each latent frame."""
    return jnp.repeat(codebook[codes], config.num_latents // codes.shape[1], axis=1)


def _places(grid: tuple[int, int], config: VideoConfig) -> tuple[slice, slice]:
    rows, columns = map(code_grids.patches, grid, config.image_grids[-1])
    return rows, columns


@sharding.automatic()
def clip_loss(
    model: VideoSPAE, batch: Batch, rng: Key[Array, ""]
) -> tuple[Float32[Array, ""], Metrics]:
    """Pixel error + codebook loss, unless the codebook is a language's, + weighted commitment loss.

    Args:
        model: the clip tokenizer.
        batch: `clips` uint8 [B, T, H, W, 3].
        rng: unused.

    Returns:
        The loss, and sums with weights under the names of `objective.loss_fn`.
    """
    del rng
    config, codebook = model.config, model.codebook[...]
    clips = image_ops.to_float(batch["clips"])
    z = model.embed(clips)
    codes = quantize_clips(z, codebook, config)
    averages = clip_averages(codes, codebook, config)
    fold = lambda x: x.reshape(-1, *x.shape[2:])
    grids, folded = config.image_grids, [fold(average) for average in averages]
    passed = quantize.straight_through(fold(z), folded[-1], grids).reshape(z.shape)
    made = model.render(passed)
    codebook_loss, commitment_loss = quantize.quantization_losses(fold(z), folded, grids)
    loss = jnp.mean((made - clips) ** 2) + config.image.commitment_weight * commitment_loss
    if config.image.codebook == "learned":
        loss += codebook_loss
    count = jnp.float32(len(clips))
    squares = quantize.target_squares(fold(z), folded, grids)
    metrics = {
        "loss": (loss * count, count),
        "codebook_loss": (codebook_loss * count, count),
        "commitment_loss": (commitment_loss * count, count),
        "latent_errors": (quantize.latent_errors(fold(z), folded, grids) * count, count),
        "latent_square": (jnp.mean(z**2) * count, count),
        "target_squares": (squares * count, count),
        "codebook_square": (jnp.mean(codebook**2) * count, count),
        "squared_error": (jnp.sum((jnp.clip(made, 0, 1) - clips) ** 2), jnp.float32(clips.size)),
        "code_frequencies": (_frequencies(codes, config), jnp.float32(codes.size)),
    }
    return loss, metrics


def _frequencies(
    codes: Int[Array, "B num_codes"], config: VideoConfig
) -> Float32[Array, "levels codebook_size"]:
    parts: Sequence[Array] = jnp.split(codes, config.ends[:-1], axis=1)
    size = config.image.codebook_size
    return jnp.stack([quantize.code_counts(part, size) for part in parts])
