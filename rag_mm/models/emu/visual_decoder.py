"""Emu's visual decoder: a diffusion model that draws an image from the N codes of one (docs/papers/emu.md).

The published one is Stable Diffusion 1.5's U-Net, whose cross-attention has new keys and values, on the
latents of its frozen autoencoder. A small transformer on pixels does for small images.

In training a tenth of all conditions is replaced by the null condition, the codes that Emu makes of the empty
prompt; drawing is guided away from the same one. It is kept with the parameters, and so are the statistics
that standardise conditions: `FITTED` parameters, which a stage puts in (`fit`) and never trains. So is the
autoencoder.
"""

import dataclasses
import fnmatch
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Key, UInt8, UInt32

from rag_mm.core import checks, sharding
from rag_mm.models.emu import image_codes
from rag_mm.models.emu.dit import DiT, DiTConfig
from rag_mm.models.emu.latent_vae import LatentVAE, LatentVAEConfig
from rag_mm.models.emu.unet import UNet, UNetConfig
from rag_mm.models.objective_types import Batch, Metrics
from rag_mm.nn.param_trees import Params
from rag_mm.ops import diffusion

# Parameters that are fitted or given, not trained: patterns for what a stage freezes.
FITTED = ("statistics/*", "null", "vae/*")


@dataclasses.dataclass(frozen=True)
class VisualDecoderConfig:
    """Sizes of a visual decoder, how it is trained, and how it draws unless told otherwise.

    Attributes:
        num_slots: N, vectors of a condition.
        condition_dim: R, their width.
        dit: the network, unless there is a `unet`.
        unet: the network instead; None: a transformer.
        vae: the frozen autoencoder whose latents are denoised; None: pixels are.
        noise: schedule, and what the network predicts.
        drop_rate: share of training conditions replaced by the null condition.
        time_power: a training step is at the share u ** time_power of all steps, for u uniform in 0..1; below
            1 noisy images are more frequent.
        num_steps: steps of drawing.
        guidance: scale of classifier-free guidance in drawing; 1: none.
        method: the sampler: ddim | pndm.
    """

    num_slots: int
    condition_dim: int
    dit: DiTConfig = dataclasses.field(default_factory=DiTConfig)
    noise: diffusion.NoiseConfig = dataclasses.field(
        default_factory=diffusion.NoiseConfig.of_pixels
    )
    unet: UNetConfig | None = None
    vae: LatentVAEConfig | None = None
    drop_rate: float = 0.1
    time_power: float = 0.7
    num_steps: int = 10
    guidance: float = 2.0
    method: str = "ddim"

    def __post_init__(self):
        checks.at_least(self, 1, "num_slots", "condition_dim", "num_steps")
        checks.at_least(self, 0, "guidance")
        checks.between(self, 0, 1, "drop_rate")
        checks.above(self, 0, "time_power")
        diffusion.make_plan(self.noise, self.method, self.num_steps)
        size, _, channels = self.noisy_shape
        found = (size, channels)
        wanted = (size, 3) if self.vae is None else (self.vae.latent_size, self.vae.latent_dim)
        if found != wanted:
            raise ValueError(
                f"the network denoises {size} x {size} places of {channels} channels, but it is given "
                f"{wanted[0]} x {wanted[0]} of {wanted[1]}: make image_size and num_channels of "
                f"{'dit' if self.unet is None else 'unet'} fit {'pixels' if self.vae is None else 'vae'}"
            )

    @property
    def noisy_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of what is denoised."""
        network = self.dit if self.unet is None else self.unet
        return network.image_size, network.image_size, network.num_channels

    @property
    def image_size(self) -> int:
        """Pixels a side of the images that it draws."""
        return self.noisy_shape[0] if self.vae is None else self.vae.image_size

    @classmethod
    def sd15(cls, num_slots: int = 32, condition_dim: int = 5120) -> "VisualDecoderConfig":
        """The paper's: Stable Diffusion 1.5 with new keys and values, PNDM in 50 steps, guidance 5."""
        return cls(
            num_slots,
            condition_dim,
            noise=diffusion.NoiseConfig(),
            unet=UNetConfig(),
            vae=LatentVAEConfig(),
            time_power=1.0,
            num_steps=50,
            guidance=5.0,
            method="pndm",
        )

    @classmethod
    def tiny(cls) -> "VisualDecoderConfig":
        """The paper's parts in small, for tests: images of 16 pixels, conditions of 2 vectors of width 6."""
        return dataclasses.replace(
            cls.sd15(2, 6),
            unet=UNetConfig(8, 4, (8, 16), (True, False), 1, num_heads=2, num_groups=4),
            vae=LatentVAEConfig(16, (8, 16), 1, num_groups=4),
            num_steps=4,
        )


class VisualDecoder(nnx.Module):
    """The network, and what standardises and replaces its conditions."""

    def __init__(self, config: VisualDecoderConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.network: DiT | UNet
        if c.unet is None:
            self.network = DiT(c.dit, c.num_slots, c.condition_dim, rngs=rngs)
        else:
            self.network = UNet(c.unet, c.condition_dim, rngs=rngs)
        self.vae = None if c.vae is None else LatentVAE(c.vae, rngs=rngs)
        self.statistics = image_codes.Statistics(c.num_slots, c.condition_dim)
        zeros = jnp.zeros((c.num_slots, c.condition_dim), jnp.float32)
        self.null = nnx.Param(zeros, axes=(None, None))

    def __call__(
        self,
        noisy: Float32[Array, "B H W C"],
        time: Int[Array, " B"],
        condition: Float[Array, "B N R"],
    ) -> Float32[Array, "B H W C"]:
        """What the network predicts of noisy images at steps `time`, given conditions as Emu makes them."""
        standard = self.statistics(condition.astype(jnp.float32))
        if isinstance(self.network, UNet):
            return self.network(noisy, time, standard)
        share = (time.astype(jnp.float32) + 1) / self.config.noise.num_train_steps
        return self.network(noisy, share, standard)

    def encode(
        self, images: UInt8[Array, "B H W 3"], rng: Key[Array, ""]
    ) -> Float32[Array, "B h w C"]:
        """What is denoised, of images: pixels in -1..1, or sampled latents without a gradient."""
        pixels = from_pixels(images)
        if self.vae is None:
            return pixels
        return jax.lax.stop_gradient(self.vae.encode(pixels, rng))

    def decode(self, made: Float32[Array, "B h w C"]) -> UInt8[Array, "B H W 3"]:
        """Images of what is denoised."""
        return to_pixels(made if self.vae is None else self.vae.decode(made))

    def drop(
        self, condition: Float[Array, "B N R"], is_dropped: Bool[Array, " B"]
    ) -> Float32[Array, "B N R"]:
        """Conditions, or the null condition where they are dropped; no gradient in it."""
        null = jax.lax.stop_gradient(self.null[...])[None]
        return jnp.where(is_dropped[:, None, None], null, condition.astype(jnp.float32))


def loss_fn(
    model: VisualDecoder, batch: Batch, rng: Key[Array, ""]
) -> tuple[Float32[Array, ""], Metrics]:
    """Mean squared error of the prediction, over all values of what is denoised.

    Args:
        model: the model.
        batch: `images` uint8 [B, H, W, 3] and `condition` float [B, N, R], their codes as Emu makes them.
        rng: of steps, noise and drops.

    Returns:
        The loss, and sums with weights: loss; loss_given and loss_null of images with and without their
        condition; loss_clean and loss_noisy of those in the lower and upper half of steps; image_mse of the
        pixels in -1..1, or latents, that the prediction amounts to.
    """
    c, condition = model.config, jnp.asarray(batch["condition"])

    @sharding.automatic("batch")
    def make_noisy(images: jax.Array, rng: jax.Array) -> tuple[jax.Array, ...]:
        of_step, of_noise, of_drop = jax.random.split(rng, 3)
        size = images.shape[:1]
        share = jax.random.uniform(of_step, size) ** c.time_power
        last = c.noise.num_train_steps - 1
        time = jnp.minimum((share * c.noise.num_train_steps).astype(jnp.int32), last)
        kept = jnp.asarray(diffusion.image_shares(c.noise))[time]
        noise = jax.random.normal(of_noise, images.shape)
        noisy = diffusion.add_noise(images, noise, kept)
        aim = diffusion.target(images, noise, kept, c.noise.prediction)
        return noisy, aim, time, kept, jax.random.bernoulli(of_drop, c.drop_rate, size)

    of_latents, rng = jax.random.split(rng)
    images = model.encode(jnp.asarray(batch["images"]), of_latents)
    noisy, aim, time, kept, is_dropped = make_noisy(images, rng)
    predicted = model(noisy, time, model.drop(condition, is_dropped))
    errors = jnp.square(predicted - aim).mean((1, 2, 3))
    made, _ = diffusion.split_noise(noisy, predicted, kept, c.noise.prediction)
    count = jnp.float32(len(images))
    is_late = time >= c.noise.num_train_steps // 2
    metrics: Metrics = {
        "loss": (errors.sum(), count),
        "loss_given": _chosen(errors, ~is_dropped),
        "loss_null": _chosen(errors, is_dropped),
        "loss_clean": _chosen(errors, ~is_late),
        "loss_noisy": _chosen(errors, is_late),
        "image_mse": (jnp.square(made - images).mean((1, 2, 3)).sum(), count),
    }
    return errors.sum() / count, metrics


def draw(
    params: Params,
    condition: Float[Array | np.ndarray, "B N R"],
    seeds: UInt32[Array | np.ndarray, " B"],
    *,
    graphdef: nnx.GraphDef,
    config: VisualDecoderConfig,
    guidance: float | None = None,
    num_steps: int | None = None,
    method: str | None = None,
) -> UInt8[Array, "B H W 3"]:
    """Images of conditions, by one compiled scan; an image depends on its own condition and seed only.

    Args:
        params: the model's parameters.
        condition: codes as Emu makes them.
        seeds: of the noise that each image starts from.
        graphdef: the model's structure.
        config: the model's.
        guidance, num_steps, method: None: the config's; `guidance` is not compiled in.

    Raises:
        ValueError: as `diffusion.make_plan`.
    """
    guidance = config.guidance if guidance is None else guidance
    return _draw(
        params,
        jnp.asarray(condition, jnp.float32),
        jnp.asarray(seeds),
        jnp.float32(guidance),
        graphdef=graphdef,
        method=method or config.method,
        num_steps=num_steps or config.num_steps,
        is_guided=guidance != 1,
    )


@partial(jax.jit, static_argnames=("graphdef", "method", "num_steps", "is_guided"))
def _draw(
    params: Params,
    condition: jax.Array,
    seeds: jax.Array,
    guidance: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    method: str,
    num_steps: int,
    is_guided: bool,
) -> jax.Array:
    model: VisualDecoder = nnx.merge(graphdef, params)
    c = model.config

    @sharding.automatic("batch")
    def make_noise(seeds: jax.Array) -> jax.Array:
        make = lambda seed: jax.random.normal(jax.random.key(seed), c.noisy_shape)
        return jax.vmap(make)(seeds)

    everywhere = jnp.zeros_like(seeds, bool)

    def predict(noisy: jax.Array, step: jax.Array) -> jax.Array:
        time = jnp.full_like(seeds, step, jnp.int32)
        given = model(noisy, time, model.drop(condition, everywhere))
        if not is_guided:
            return given
        null = model(noisy, time, model.drop(condition, ~everywhere))
        return diffusion.guide(given, null, guidance)

    plan = diffusion.make_plan(c.noise, method, num_steps)
    return model.decode(diffusion.sample(predict, make_noise(seeds), c.noise, plan))


def from_pixels(images: UInt8[Array, "B H W 3"]) -> Float32[Array, "B H W 3"]:
    """0..255 as -1..1."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_pixels(images: Float32[Array, "B H W 3"]) -> UInt8[Array, "B H W 3"]:
    """-1..1, clipped, as 0..255."""
    return jnp.round((jnp.clip(images, -1, 1) + 1) * 127.5).astype(jnp.uint8)


def fit(
    params: Params, condition: Float[np.ndarray, "B N R"], null: Float[np.ndarray, "N R"]
) -> Params:
    """The parameters with the statistics of training conditions, and with the null condition.

    Raises:
        ValueError: the null condition has another shape than the model's.
    """
    found = image_codes.fit_statistics(condition)
    given = {"statistics": found, "null": np.asarray(null, np.float32)}

    def put(leaf: jax.Array, value: np.ndarray) -> jax.Array:
        if leaf.shape != value.shape:
            raise ValueError(f"conditions are {value.shape}, but the model takes {leaf.shape}")
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    own = {name: params[name] for name in given}
    return params | jax.tree.map(put, own, given)


def is_fitted(path: str) -> bool:
    """Whether a parameter is given or fitted to conditions, not trained."""
    return any(fnmatch.fnmatch(path, pattern) for pattern in FITTED)


def _chosen(
    errors: Float32[Array, " B"], is_chosen: Bool[Array, " B"]
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Sum and number of the errors that are chosen."""
    weights = is_chosen.astype(jnp.float32)
    return (errors * weights).sum(), weights.sum()
