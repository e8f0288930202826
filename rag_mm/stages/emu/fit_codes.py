"""Parameters of an Emu that are made from training images, not trained: statistics, and components."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.models.emu import image_codes
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.nn.param_trees import Params
from rag_mm.stages.emu.training_rows import RowSource

NUM_FITTED = 4096  # Pictures that statistics and components are made from.


@dataclasses.dataclass(frozen=True, eq=False)
class Fitting:
    """Makes the parameters that are not trained, from the pictures of random training sequences.

    Attributes:
        config: the model's sizes.
        source: the training sequences.
        seed: of the choice of pictures.
    """

    config: EmuConfig
    source: RowSource
    seed: int

    def before(self, params: Params) -> Params:
        """The initial parameters with statistics of the tower's tokens, and with components of them."""
        targets = self.config.targets
        if not targets.standardises_tokens and targets.kind != "pca":
            return params
        if self.config.has_tower:
            raise UserError(
                "A tower that is trained has no fixed statistics: set emu.emu_data.pictures to tokens, or "
                "targets.standardises_tokens to False and another kind than pca."
            )
        tokens = self._pictures().astype(np.float32)
        if targets.standardises_tokens:
            found = image_codes.fit_statistics(tokens)
            params = _replace(params, "vision_statistics", found)
            tokens = (tokens - found["mean"]) / found["std"]
        if targets.kind == "pca":
            found = image_codes.fit_components(tokens, targets.pca_dim, targets.has_class_slot)
            params = _replace(params, "components", found)
        return params

    def after(self, graphdef: nnx.GraphDef, params: Params, mesh: Mesh) -> Params:
        """The trained parameters with statistics of the codes, for standardised ones."""
        if self.config.targets.kind != "standardised":
            return params

        @jax.jit
        def sums(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, params)
            given = batch["pictures"].astype(jnp.float32)
            tokens = model.see(given / 255) if self.config.has_tower else given
            codes = model.encode(tokens).astype(jnp.float32)
            add = lambda codes: (codes.sum(0), jnp.square(codes).sum(0))
            return sharding.automatic()(add)(codes)

        pictures, found = self._pictures(), []
        size = 256 // jax.device_count() * jax.device_count()
        count, rows = len(pictures) // size * size, sharding.local_rows(size, mesh)
        for start in range(0, count, size):
            own = pictures[start + rows.start : start + rows.stop]
            part = sums(params, sharding.put_batch({"pictures": own}, mesh))
            found.append([np.asarray(each, np.float64) for each in part])
        total, squares = (sum(parts) for parts in zip(*found, strict=True))
        mean = total / count
        variance = np.maximum(squares / count - mean**2, 0) + image_codes.VARIANCE_FLOOR
        return _replace(params, "code_statistics", {"mean": mean, "std": np.sqrt(variance)})

    def _pictures(self) -> np.ndarray:
        """The arrays of `NUM_FITTED` pictures, as often as they occur in sequences."""
        rng, numbers = np.random.default_rng((self.seed, 1)), np.zeros(0, np.int32)
        num_drawn = 0
        while len(numbers) < NUM_FITTED:
            if num_drawn == NUM_FITTED and not len(numbers):
                raise UserError(
                    "The training sequences show no picture; give sequences.mixture others than texts."
                )
            num_drawn += 1
            made = self.source.make(np.int64(rng.integers(1 << 30)), rng)
            numbers = np.concatenate([numbers, made["pictures"]])
        return self.source.pictures.take(numbers[:NUM_FITTED])


def _replace(params: Params, part: str, values: Mapping[str, np.ndarray]) -> Params:
    put = lambda name, leaf: jax.device_put(values[name].astype(leaf.dtype), leaf.sharding)
    return {**params, part: {name: put(name, leaf) for name, leaf in params[part].items()}}
