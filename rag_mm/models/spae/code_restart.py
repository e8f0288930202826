"""Restart of dead codes while a learned codebook is trained.

A code that no vector is nearest to has no gradient, so it stays unused for ever. Such a code is moved to one
of the batch's vectors whose quantization error is large, as in Jukebox (Dhariwal et al. 2020, section 3).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Key

from rag_mm.core import checks, sharding
from rag_mm.models.objective_types import Batch, Metrics
from rag_mm.models.spae import objective
from rag_mm.models.spae.autoencoder import SPAE
from rag_mm.models.spae.spae_config import SPAEConfig
from rag_mm.ops import quantize

Shares = Float32[Array, " C"]


@dataclasses.dataclass(frozen=True)
class RestartConfig:
    """When codes are moved.

    Attributes:
        every: steps between restarts; 0: no code is moved.
        min_use: a code is dead if its average use is below this fraction of an even use of all codes.
        decay: decay per step of each code's average use, which starts, also after a move, at an even use.
        until: fraction of the training's steps after which no code is moved, so that all moved ones are
            trained, and moving averages of the parameters follow.
    """

    every: int = 0
    min_use: float = 0.02
    decay: float = 0.98
    until: float = 0.8

    def __post_init__(self):
        checks.at_least(self, 0, "every")
        checks.below_one(self, "min_use", "decay")
        checks.between(self, 0, 1, "until")

    def check(self, model: SPAEConfig) -> None:
        """Raises ValueError if codes were moved that must not be: words of a language codebook."""
        if self.every and model.codebook != "learned":
            raise ValueError(
                f"restart.every is {self.every}, but a codebook of words never changes; give 0, or "
                "model.codebook=learned"
            )


def init(codebook_size: int) -> Shares:
    """Average uses at step 0: even."""
    return jnp.full(codebook_size, 1 / codebook_size, jnp.float32)


@sharding.automatic()
def update(
    model: SPAE,
    batch: Batch,
    metrics: Metrics,
    use: Shares,
    *,
    step: Int32[Array, ""],
    rng: Key[Array, ""],
    config: RestartConfig,
    num_steps: int,
) -> tuple[dict[str, Float32[Array, "C D"]], Shares, Metrics]:
    """Counts the step's codes and, every `config.every` steps, moves dead ones.

    Args:
        model: the image tokenizer after the step's updates.
        batch: images as of `objective.loss_fn`, whose vectors may become codes.
        metrics: of `objective.loss_fn` in this step; those of a skipped update count for nothing.
        use: average share of each code in a step's codes.
        step: steps taken, this one included.
        rng: of the step.
        config: when codes are moved.
        num_steps: of the whole training.

    Returns:
        The codebook, the next average uses, and `restarted_codes`: those moved in a restart.
    """
    counts, total = metrics["code_frequencies"]
    rate = jnp.where(total > 0, jnp.float32(1 - config.decay), jnp.float32(0))
    use = use + rate * (counts.sum(axis=0) / jnp.maximum(total, 1) - use)
    is_dead = use < config.min_use / use.size
    is_due = (step % config.every == 0) & (step <= int(config.until * num_steps)) & (total > 0)
    codebook = model.codebook[...]

    def move() -> Float32[Array, "C D"]:
        points, errors = objective.quantized_points(model, batch, rng)
        return quantize.revive_codes(codebook, is_dead, points, errors, jax.random.fold_in(rng, 2))

    codebook = jax.lax.cond(is_due, move, lambda: codebook)
    moved = jnp.where(is_due, is_dead.sum().astype(jnp.float32), jnp.float32(0))
    use = jnp.where(is_due & is_dead, init(use.size), use)
    return {"codebook": codebook}, use, {"restarted_codes": (moved, is_due.astype(jnp.float32))}
