"""Sizes of SPAE for clips, whose codes are a pyramid in time as well."""

import dataclasses

from rag_mm.core import checks
from rag_mm.core.code_grids import Grids
from rag_mm.core.errors import UserError
from rag_mm.models.spae.spae_config import SPAEConfig


@dataclasses.dataclass(frozen=True)
class VideoConfig:
    """An image tokenizer inflated to clips, and how its codes divide time.

    A level has a code at the same places of the grid as in the image tokenizer, once for every stretch of
    latent frames: a coarse level may have one stretch, the whole clip, a fine level one for each frame.

    Attributes:
        image: the image tokenizer.
        num_frames: frames of a clip.
        time_stride: frames that one latent frame stands for.
        level_frames: stretches that each level divides the latent frames into, coarse to fine; empty: each
            level has a code for every latent frame.
    """

    image: SPAEConfig
    num_frames: int = 8
    time_stride: int = 1
    level_frames: tuple[int, ...] = ()

    def __post_init__(self):
        checks.at_least(self, 1, "num_frames", "time_stride")
        if self.num_frames % self.time_stride:
            raise UserError(
                f"time_stride={self.time_stride} does not divide num_frames={self.num_frames}."
            )
        frames = self.stretches
        if len(frames) != len(self.image.levels) or any(
            count < 1 or self.num_latents % count for count in frames
        ):
            raise UserError(
                f"level_frames={self.level_frames}: give each of the {len(self.image.levels)} levels a "
                f"divisor of the {self.num_latents} latent frames."
            )
        if self.image.guide_dim or self.image.is_residual:
            raise UserError(
                "Clips need an image tokenizer with guide_dim=0 and quantizer=average; train another one."
            )

    @property
    def num_latents(self) -> int:
        """Latent frames of a clip."""
        return self.num_frames // self.time_stride

    @property
    def stretches(self) -> tuple[int, ...]:
        """Stretches of each level."""
        return self.level_frames or (self.num_latents,) * len(self.image.levels)

    @property
    def image_grids(self) -> Grids:
        """(rows, columns) of each level."""
        return self.image.grids_at(self.image.image_size, self.image.image_size)

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """(frames, rows, columns) of each level, coarse to fine."""
        return tuple(
            (frames, *grid) for frames, grid in zip(self.stretches, self.image_grids, strict=True)
        )

    @property
    def ends(self) -> list[int]:
        """For each level, the number of codes of all levels up to it."""
        sizes = [frames * rows * columns for frames, rows, columns in self.grids]
        return [sum(sizes[: number + 1]) for number in range(len(sizes))]

    @property
    def num_codes(self) -> int:
        """Codes of a clip."""
        return self.ends[-1]
