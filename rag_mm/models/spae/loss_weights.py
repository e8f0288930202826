"""Weights of the losses that are added to pixels, codebook and commitment."""

import dataclasses

from rag_mm.core import checks


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of the losses added to SPAE; a term of weight 0 is left out of the program.

    The paper trains with perceptual=0.1, adversarial=0.1 and lecam=1e-4, MAGVIT's code also with r1=10.

    Attributes:
        perceptual: of the distance of a frozen tower's features (`perceptual`).
        adversarial: of the generator's loss against the discriminator (`adversarial`); above 0 a
            discriminator is trained beside the image tokenizer.
        r1: of the penalty on the discriminator's gradient at real images.
        lecam: of LeCAM's pull of the discriminator's logits towards their moving averages.
    """

    perceptual: float = 0.0
    adversarial: float = 0.0
    r1: float = 0.0
    lecam: float = 0.0

    def __post_init__(self):
        checks.at_least(self, 0, "perceptual", "adversarial", "r1", "lecam")
        if not self.adversarial and (self.r1 or self.lecam):
            raise ValueError(
                f"r1={self.r1} and lecam={self.lecam} are terms of the discriminator's loss; give "
                "adversarial more than 0, or leave them at 0"
            )
