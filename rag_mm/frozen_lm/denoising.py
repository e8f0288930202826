"""Tasks on an image's codes, and examples in context made from the image itself (SPAE, appendix).

The examples are noisy copies of the image, so most of its codes can be read off them by counting:
`majority_codes` is the baseline of every figure.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageFilter

from rag_mm.core import code_grids
from rag_mm.core.code_grids import Grids

SHARES = tuple(round(0.5 - 0.03 * i, 2) for i in range(10))
"""Share of wrong codes in each of ten noisy copies: 0.50, 0.47, ..., 0.23."""
_GRAY = 127


class CodePair(NamedTuple):
    """What is given of an image, a caption or codes int32 [N], and its own codes int32 [N]."""

    condition: str | np.ndarray
    target: np.ndarray


def _box(size: int) -> np.ndarray:
    """The middle half of an image in both directions: bool [size, size]."""
    inside = np.zeros((size, size), bool)
    inside[size // 4 : size - size // 4, size // 4 : size - size // 4] = True
    return inside


def _gray(pixels: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    return np.where(hidden[:, :, None], np.uint8(_GRAY), pixels)


def _blurred(pixels: np.ndarray) -> np.ndarray:
    radius = len(pixels) / 16
    return np.asarray(PIL.Image.fromarray(pixels).filter(PIL.ImageFilter.GaussianBlur(radius)))


CONDITIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "inpaint": lambda pixels: _gray(pixels, _box(len(pixels))),
    "outpaint": lambda pixels: _gray(pixels, ~_box(len(pixels))),
    "deblur": _blurred,
    "rotate": lambda pixels: np.rot90(pixels).copy(),
    "shift": lambda pixels: np.roll(pixels, len(pixels) // 4, axis=1),
}
"""Task -> the image that is given, uint8 [S, S, 3], from the one wanted: its middle or all but its middle is
gray, it is blurred, turned by 90 degrees, or moved to the right by a quarter."""


def wanted_codes(task: str, image_size: int, grids: Grids) -> np.ndarray:
    """The codes that a task asks for, bool [N]: those in the gray part, or all."""
    if task not in ("inpaint", "outpaint"):
        return np.ones(code_grids.num_codes(grids), bool)
    box = _box(image_size)
    return code_grids.mask_of_pixels(box if task == "inpaint" else ~box, grids)


def noisy_pairs(
    pair: CodePair,
    codebook_size: int,
    *,
    shares: Sequence[float] = SHARES,
    num_clean: int = 21,
    seed: int = 0,
) -> list[CodePair]:
    """Copies of a pair of codes, in each of which a share is replaced by random codes.

    A replaced place gets the same code in condition and target.

    Args:
        pair: codes of the condition and of the image itself, int [N].
        codebook_size: number of different codes.
        shares: share replaced in each copy, in 0..1.
        num_clean: the first codes, which stay.
        seed: of the noise.
    """
    assert not isinstance(pair.condition, str)
    rng = np.random.default_rng(seed)
    copies = []
    for share in shares:
        is_replaced = rng.random(len(pair.target)) < share
        is_replaced[:num_clean] = False
        noise = rng.integers(codebook_size, size=len(pair.target), dtype=np.int32)
        mixed = (np.where(is_replaced, noise, codes) for codes in (pair.condition, pair.target))
        copies.append(CodePair(*mixed))
    return copies


def majority_codes(examples: Sequence[CodePair]) -> np.ndarray:
    """The most frequent code of the examples' targets at each place, int32 [N]; the smallest of a tie."""
    targets = np.stack([example.target for example in examples])
    return np.asarray([np.bincount(column).argmax() for column in targets.T], np.int32)
