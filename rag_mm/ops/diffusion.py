"""Diffusion in discrete steps: noise schedules, what a network predicts of noisy images, and samplers.

With a_t the cumulative product of 1 - beta up to step t, a noisy image is sqrt(a_t) x + sqrt(1 - a_t) e.
Samplers agree step by step with diffusers' `DDIMScheduler` and `PNDMScheduler`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from rag_mm.core import checks

KINDS = ("linear", "scaled_linear", "cosine")
PREDICTIONS = ("epsilon", "v", "image")
SPACINGS = ("leading", "trailing")
METHODS = ("ddim", "pndm")
_MAX_BETA = 0.999
# Adams-Bashforth (Liu et al. 2022, equation 12): weights of the last predictions, the newest first.
_MULTISTEP = np.array(
    [
        [1, 0, 0, 0],
        [3 / 2, -1 / 2, 0, 0],
        [23 / 12, -16 / 12, 5 / 12, 0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ]
)


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """How images become noise and back; the defaults are Stable Diffusion 1.5's.

    Attributes:
        kind: of the betas: linear; scaled_linear, in their roots; or cosine (Nichol & Dhariwal 2021).
        num_train_steps: steps from an image to noise, of which drawing takes a few.
        first_beta: the first step's, for linear kinds.
        last_beta: the last step's, for linear kinds.
        prediction: what the network predicts: epsilon, the noise e; v = sqrt(a_t) e - sqrt(1 - a_t) x; or
            image, x itself, which a network can whose width is below a patch's values, unlike noise.
        spacing: of the steps that drawing takes: leading, from `offset` at equal distances; or trailing,
            from the last one down.
        offset: added to leading steps.
        ends_at_image: whether the last step of drawing ends without noise; False: with the first step's.
        clips: whether drawing clips what the network makes of the image to -1..1.
    """

    kind: str = "scaled_linear"
    num_train_steps: int = 1000
    first_beta: float = 0.00085
    last_beta: float = 0.012
    prediction: str = "epsilon"
    spacing: str = "leading"
    offset: int = 1
    ends_at_image: bool = False
    clips: bool = False

    def __post_init__(self):
        for name, known in (("kind", KINDS), ("prediction", PREDICTIONS), ("spacing", SPACINGS)):
            checks.one_of(self, name, known)
        checks.at_least(self, 2, "num_train_steps")
        checks.between(self, 2, checks.MAX_SIZE, "num_train_steps")
        checks.at_least(self, 0, "offset")
        checks.below_one(self, "first_beta", "last_beta")

    @classmethod
    def of_pixels(cls) -> "NoiseConfig":
        """For small networks of pixels, in few steps: a cosine schedule; the image is predicted and clipped.

        A network narrower than a patch cannot let the noise through, which v- and noise-prediction need.
        """
        return cls("cosine", prediction="image", spacing="trailing", ends_at_image=True, clips=True)


def image_shares(config: NoiseConfig) -> Float32[np.ndarray, " num_train_steps"]:
    """a_t of all steps: the image's share of the variance, from almost 1 down to almost 0."""
    c = config
    if c.kind == "cosine":
        at = np.arange(c.num_train_steps + 1, dtype=np.float64) / c.num_train_steps
        share = np.cos((at + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - share[1:] / share[:-1], _MAX_BETA)
    elif c.kind == "scaled_linear":
        betas = np.linspace(c.first_beta**0.5, c.last_beta**0.5, c.num_train_steps) ** 2
    else:
        betas = np.linspace(c.first_beta, c.last_beta, c.num_train_steps)
    return np.cumprod(1 - betas.astype(np.float32), dtype=np.float64).astype(np.float32)


def add_noise(
    images: Float32[Array, "B H W C"],
    noise: Float32[Array, "B H W C"],
    share: Float32[Array, " B"],
) -> Float32[Array, "B H W C"]:
    """Noisy images; `share` is each one's a_t."""
    image_scale, noise_scale = _scales(share)
    return image_scale * images + noise_scale * noise


def target(
    images: Float32[Array, "B H W C"],
    noise: Float32[Array, "B H W C"],
    share: Float32[Array, " B"],
    prediction: str,
) -> Float32[Array, "B H W C"]:
    """What the network is to predict; `prediction` is of `PREDICTIONS`, `share` each image's a_t."""
    if prediction == "epsilon":
        return noise
    if prediction == "image":
        return images
    image_scale, noise_scale = _scales(share)
    return image_scale * noise - noise_scale * images


def split_noise(
    noisy: Float32[Array, "B H W C"],
    predicted: Float32[Array, "B H W C"],
    share: Float32[Array, " B"],
    prediction: str,
) -> tuple[Float32[Array, "B H W C"], Float32[Array, "B H W C"]]:
    """Image and noise that a prediction makes of a noisy image."""
    image_scale, noise_scale = _scales(share)
    if prediction == "epsilon":
        return (noisy - noise_scale * predicted) / image_scale, predicted
    if prediction == "image":
        return predicted, (noisy - image_scale * predicted) / noise_scale
    return (
        image_scale * noisy - noise_scale * predicted,
        image_scale * predicted + noise_scale * noisy,
    )


def guide(
    given: Float32[Array, "B H W C"],
    null: Float32[Array, "B H W C"],
    guidance: Float32[Array, ""] | float,
) -> Float32[Array, "B H W C"]:
    """Classifier-free guidance (Ho & Salimans 2022): the null's prediction, `guidance` times away from it."""
    return null + guidance * (given - null)


def drawing_steps(config: NoiseConfig, num_steps: int) -> Int[np.ndarray, " num_steps"]:
    """The steps at which drawing asks the network, from noise to image.

    Raises:
        ValueError: there are more than `num_train_steps` of them, or `offset` leads beyond the last.
    """
    total = config.num_train_steps
    if not 1 <= num_steps <= total:
        raise ValueError(f"drawing takes 1 to {total} steps, not {num_steps}")
    if config.spacing == "trailing":
        return np.round(np.arange(total, 0, -total / num_steps)).astype(np.int64)[:num_steps] - 1
    steps = np.arange(num_steps)[::-1] * (total // num_steps) + config.offset
    if steps[0] >= total:
        raise ValueError(f"{num_steps} steps and an offset of {config.offset} exceed {total} steps")
    return steps


class Plan(NamedTuple):
    """What a sampler does, one row a call of the network.

    Attributes:
        at: the step of the noisy image that the network sees.
        before, after: a_t before and after the update.
        weights: of this prediction, the newest, and of the three that were kept before it.
        keeps: whether this prediction is kept for later ones.
        restarts: whether the update starts from the image of the call before, not from what that became.
    """

    at: Int[np.ndarray, " calls"]
    before: Float32[np.ndarray, " calls"]
    after: Float32[np.ndarray, " calls"]
    weights: Float32[np.ndarray, "calls 4"]
    keeps: np.ndarray
    restarts: np.ndarray


def make_plan(config: NoiseConfig, method: str, num_steps: int) -> Plan:
    """The plan of a method of `METHODS`.

    ddim: the deterministic sampler of Song et al. 2021, one call a step. pndm: that of Liu et al. 2022
    without Runge-Kutta steps (PLMS), as Stable Diffusion's: an update uses the last four predictions, and
    the first one is made twice, so that there is one more call.

    Raises:
        ValueError: the method is unknown, or as `drawing_steps`.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; give one of {', '.join(METHODS)}")
    shares = image_shares(config)
    steps, distance = drawing_steps(config, num_steps), config.num_train_steps // num_steps
    last = np.float32(1) if config.ends_at_image else shares[0]
    following = steps - distance
    after = np.where(following >= 0, shares[np.maximum(following, 0)], last)
    before, calls = shares[steps], num_steps
    weights = np.tile(_MULTISTEP[0], (num_steps, 1))
    keeps, restarts = np.ones(num_steps, bool), np.zeros(num_steps, bool)
    if method == "pndm" and num_steps > 1:
        # The second call sees where the first led, and repeats the first update with the mean of both.
        steps, before, after = (
            np.insert(x, 1, x[i]) for x, i in ((steps, 1), (before, 0), (after, 0))
        )
        calls = num_steps + 1
        orders = np.minimum(np.arange(calls), 4) - 1
        weights = _MULTISTEP[np.maximum(orders, 0)]
        weights[1] = [1 / 2, 1 / 2, 0, 0]
        keeps, restarts = np.arange(calls) != 1, np.arange(calls) == 1
    single = np.float32
    return Plan(
        steps, before.astype(single), after.astype(single), weights.astype(single), keeps, restarts
    )


def sample(
    predict: Callable[[Float32[Array, "B H W C"], Int[Array, ""]], Float32[Array, "B H W C"]],
    noise: Float32[Array, "B H W C"],
    config: NoiseConfig,
    plan: Plan,
) -> Float32[Array, "B H W C"]:
    """Images from noise, by one scan over the plan.

    Args:
        predict: (noisy images, step) -> what the network predicts, guidance included.
        noise: of standard deviation 1.
        config: the schedule that `plan` was made from.
        plan: from `make_plan`.
    """

    def call(carry: tuple[jax.Array, ...], row: Plan) -> tuple[tuple[jax.Array, ...], None]:
        noisy, start, kept = carry
        newest = predict(noisy, row.at)
        recent = jnp.concatenate([newest[None], kept])
        predicted = jnp.tensordot(row.weights, recent, axes=1)
        start = jnp.where(row.restarts, start, noisy)
        kept = jnp.where(row.keeps, recent[:-1], kept)
        return (update(start, predicted, row.before, row.after, config), start, kept), None

    rows = Plan(*(jnp.asarray(x, x.dtype if x.dtype != np.int64 else jnp.int32) for x in plan))
    empty = jnp.stack([jnp.zeros_like(noise)] * 3)
    (images, _, _), _ = jax.lax.scan(call, (noise, noise, empty), rows)
    return images


def update(
    noisy: Float32[Array, "B H W C"],
    predicted: Float32[Array, "B H W C"],
    before: Float32[Array, ""],
    after: Float32[Array, ""],
    config: NoiseConfig,
) -> Float32[Array, "B H W C"]:
    """Less noisy images: from a_t = `before` to `after` (Song et al. 2021, equation 12)."""
    size = noisy.shape[:1]
    images, noise = split_noise(noisy, predicted, jnp.broadcast_to(before, size), config.prediction)
    if config.clips:  # The noise is then what is left of the noisy image.
        images = jnp.clip(images, -1, 1)
        noise = (noisy - jnp.sqrt(before) * images) / jnp.sqrt(1 - before)
    return add_noise(images, noise, jnp.broadcast_to(after, size))


def _scales(share: Float32[Array, " B"]) -> tuple[Float32[Array, "B 1 1 1"], ...]:
    """Factors of image and noise in a noisy image."""
    share = share[:, None, None, None]
    return jnp.sqrt(share), jnp.sqrt(1 - share)
