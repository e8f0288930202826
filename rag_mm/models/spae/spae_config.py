"""Sizes of SPAE's image autoencoder (Yu et al., NeurIPS 2023)."""

import dataclasses
import math

from rag_mm.core import checks, code_grids, manifest_values
from rag_mm.core.code_grids import Grids
from rag_mm.core.errors import UserError
from rag_mm.ops import quantize

ENCODERS = ("conv", "patch", "conv_shortcut")
CODEBOOKS = ("learned", "language")
QUANTIZERS = ("average", "residual")


@dataclasses.dataclass(frozen=True)
class SPAEConfig:
    """Sizes of the image tokenizer; the defaults are SPAE's image model at 128 pixels.

    A model takes images of any height and width that its coarsest grid divides (`grids_at`).

    Attributes:
        image_size: image height and width, in pixels.
        patch_size: height and width of the patches folded into channels at input and output, in pixels.
        encoder: conv | patch | conv_shortcut; with patch, a code sees only the pixels of its patch; with
            conv_shortcut a linear map of the patch is added to convolutions, whose last layer starts at zero.
        width: channels at the finest scale.
        width_multipliers: channels of each scale, in units of `width`.
        num_res_blocks: residual blocks at each scale, and once more on the code grid.
        embed_dim: width of a codebook entry.
        codebook_size: entries of the codebook.
        levels: positions a side of each pyramid level, coarse to fine, in images of `image_size`.
        commitment_weight: weight of the commitment loss.
        random_flip_rotate: training images are flipped and rotated by quarter turns at random.
        codebook: learned | language; a language codebook holds vectors of words and is never trained.
        quantizer: average | residual: streaming average quantization, or residual vector
            quantization, its ablation.
        guide_dim: width of a frozen retriever's embedding of the image, which is mapped to the latent width
            and added where a level above the full grid has codes; 0: the image alone is encoded.
    """

    image_size: int = 128
    patch_size: int = 1
    encoder: str = "conv"
    width: int = 128
    width_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    embed_dim: int = 256
    codebook_size: int = 8192
    levels: tuple[int, ...] = (1, 2, 4, 8, 16, 16)
    commitment_weight: float = 0.33
    random_flip_rotate: bool = False
    codebook: str = dataclasses.field(default="learned", metadata=manifest_values.ADDED_LATER)
    quantizer: str = dataclasses.field(default="average", metadata=manifest_values.ADDED_LATER)
    guide_dim: int = dataclasses.field(default=0, metadata=manifest_values.ADDED_LATER)

    def __post_init__(self):
        quantize.check_levels(self.levels)
        for name in ("patch_size", "width", "embed_dim", "codebook_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is too small: give at least 1.")
        checks.between(self, 0, checks.MAX_BLOCKS, "num_res_blocks")
        checks.at_least(self, 0, "guide_dim")
        scales = self.width_multipliers
        if not 1 <= len(scales) <= checks.MAX_BLOCKS or min(scales) < 1:
            raise UserError(
                f"width_multipliers={scales}: give 1 to {checks.MAX_BLOCKS} of at least 1."
            )
        fitting = self.code_size * self.levels[-1]
        if self.image_size != fitting:
            raise UserError(
                f"image_size={self.image_size} does not fit: patches and scales downsample by "
                f"{self.code_size} and the last level is a grid of {self.levels[-1]}, so it must be "
                f"{fitting}."
            )
        for name, known in (
            ("encoder", ENCODERS),
            ("codebook", CODEBOOKS),
            ("quantizer", QUANTIZERS),
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is unknown: choose {' or '.join(known)}."
                )
        if self.encoder == "patch" and len(self.width_multipliers) > 1:
            raise UserError("encoder=patch has one scale: give a single width multiplier.")

    @property
    def code_size(self) -> int:
        """Height and width of the pixels of one code of the finest grid."""
        return self.patch_size * 2 ** (len(self.width_multipliers) - 1)

    @property
    def is_residual(self) -> bool:
        """Whether codes are of residual quantization."""
        return self.quantizer == "residual"

    @property
    def num_codes(self) -> int:
        """Codes per image of `image_size`."""
        return code_grids.num_codes(self.grids_at(self.image_size, self.image_size))

    def grids_at(self, height: int, width: int) -> Grids:
        """The grids of an image of `height` x `width` pixels; they grow with the image.

        With levels=(4, 8), for instance, an image of half of `image_size` has grids of 2x2 and 4x4.

        Raises:
            UserError: a grid does not divide the image.
        """
        strides = [self.levels[-1] // side for side in self.levels]  # in codes of the finest grid
        multiple = self.code_size * math.lcm(*strides)
        if min(height, width) < 1 or height % multiple or width % multiple:
            raise UserError(
                f"Images of {height} x {width} pixels do not fit the image tokenizer's levels={self.levels}; "
                f"give a height and a width that are multiples of {multiple}."
            )
        rows, columns = height // self.code_size, width // self.code_size
        return tuple((rows // stride, columns // stride) for stride in strides)

    @classmethod
    def tiny(cls) -> "SPAEConfig":
        """For tests: 32-pixel images as 64 codes, codebook of 256, plain VQ; trains in seconds."""
        return cls(
            image_size=32,
            patch_size=4,
            encoder="patch",
            width=16,
            width_multipliers=(1,),
            num_res_blocks=1,
            embed_dim=48,
            codebook_size=256,
            levels=(8,),
            commitment_weight=1.0,
            random_flip_rotate=True,
        )

    @classmethod
    def base(cls) -> "SPAEConfig":
        """SPAE's image model at 128 pixels: 597 codes in six levels."""
        return cls()

    @classmethod
    def large8(cls) -> "SPAEConfig":
        """SPAE's image model with two further levels of 16 x 16: 1,109 codes in eight levels."""
        return cls(levels=(1, 2, 4, 8, 16, 16, 16, 16))

    @classmethod
    def vqgan(cls) -> "SPAEConfig":
        """One level of 32 x 32 codes of 8,192 at 256 pixels, the sizes of RA-CM3's and CM3Leon's VQGAN."""
        return cls(image_size=256, levels=(32,), codebook_size=8192)
