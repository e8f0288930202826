"""A trained visual decoder as a folder: its sizes and its parameters, the null condition among them."""

import dataclasses
import math

import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from rag_mm.core import batches, configuration, files, renames
from rag_mm.core.errors import UserError
from rag_mm.models.emu import visual_decoder
from rag_mm.models.emu.visual_decoder import VisualDecoder, VisualDecoderConfig
from rag_mm.nn.param_trees import Params
from rag_mm.stages.shared import frozen
from rag_mm.train import checkpoint

RECORD, PARAMS = "model.json", "params"
_AT_ONCE = 64  # Images drawn at once.


def make_model(config: VisualDecoderConfig, seed: int) -> VisualDecoder:
    """An untrained model."""
    return VisualDecoder(config, rngs=nnx.Rngs(params=seed))


def save(
    folder: epath.Path, config: VisualDecoderConfig, params: Params, is_leader: bool = True
) -> None:
    """Writes what `load` reads; with several processes all call it, and the leader writes the small file."""
    checkpoint.save_params(folder / PARAMS, params)
    if is_leader:
        model = renames.to_stored(dataclasses.asdict(config))
        files.write_json(folder / RECORD, {"model": model})


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedVisualDecoder:
    """A trained visual decoder, in calls on arrays of the host.

    Attributes:
        config: its sizes, and how it draws unless told otherwise.
        model: structure and parameters.
    """

    config: VisualDecoderConfig
    model: frozen.LoadedModel

    @property
    def null(self) -> np.ndarray:
        """The codes of the empty prompt, float32 [N, R]."""
        return np.asarray(self.model.params["null"])

    def draw(
        self, codes: np.ndarray, seed: int, guidance: float | None = None, steps: int | None = None
    ) -> np.ndarray:
        """Images uint8 [B, H, W, 3] of codes [B, N, R].

        Args:
            codes: regressed from prompts, or those of images.
            seed: of the noise, at least 0; that of an image depends on its place, not on its codes.
            guidance: moves away from what the empty prompt gives; 1 does not. None for the config's.
            steps: None for the config's number.

        Raises:
            UserError: the codes are of another model, or an argument is out of range.
        """
        self.check(codes.shape[1:])
        most = self.config.noise.num_train_steps
        if guidance is not None and not 0 <= guidance < math.inf:
            raise UserError(f"guidance is {guidance}; give a finite number of at least 0.")
        if steps is not None and not 1 <= steps <= most:
            raise UserError(f"steps is {steps}; give 1 to {most:,}.")
        if seed < 0:
            raise UserError(f"seed is {seed}; give 0 or more.")
        seeds = np.random.default_rng(seed).integers(1 << 32, size=len(codes), dtype=np.uint32)
        drawn = [
            visual_decoder.draw(
                self.model.params,
                codes[rows].astype(np.float32),
                seeds[rows],
                graphdef=self.model.graphdef,
                config=self.config,
                guidance=guidance,
                num_steps=steps,
            )
            for rows in batches.split(len(codes), _AT_ONCE)
        ]
        return np.concatenate([np.asarray(part) for part in drawn])[: len(codes)]

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises UserError unless an image's codes of this shape, (N, R), are what it draws from."""
        own = (self.config.num_slots, self.config.condition_dim)
        if tuple(shape) != own:
            raise UserError(
                f"The visual decoder draws from {own[0]} vectors of width {own[1]} an image, but is given "
                f"{' x '.join(map(str, shape))}; use the one that was trained with this Emu."
            )


def load(folder: epath.Path, mesh: Mesh | None = None) -> LoadedVisualDecoder:
    """Loads the model from the folder of a finished stage, onto a mesh if one is given.

    Raises:
        UserError: there is no model, or its files do not match this version.
    """
    record = files.read_object(folder / RECORD, model=dict)
    values = renames.from_stored(record["model"])
    config = configuration.make(VisualDecoderConfig, values, str(folder / RECORD))
    loaded = frozen.load_params(folder / PARAMS, lambda: make_model(config, 0), mesh)
    return LoadedVisualDecoder(config, loaded)
