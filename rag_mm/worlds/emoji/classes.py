"""Merges glyphs into classes by the similarity of their art at the smallest drawn size."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from rag_mm.worlds.emoji import names

DISTINCT_RMS = 0.067  # What a 23.5 dB reconstruction loses: 10 ** (-23.5 / 20).
SAME_ART_RMS = 0.03  # Only duplicates are below it: flags of territories, "family".
SMALLEST_SIZE = 16  # Pixels; the smallest entity size of any level.


@dataclasses.dataclass(frozen=True)
class GlyphClass:
    """One entity: the drawn glyph, and its names (that of the glyph first)."""

    glyph: int
    names: tuple[str, ...]


def rms_to(cards: np.ndarray, card: np.ndarray) -> np.ndarray:
    """RMS difference (values 0..1) of each of `cards`, uint8 [N, S, S, 3], from `card` [S, S, 3].

    Squares are summed as integers, so that thresholding is identical on every machine.
    """
    difference = cards.astype(np.int32) - card.astype(np.int32)
    return np.sqrt((difference**2).sum(axis=(1, 2, 3)) / card.size) / 255


def merge_glyphs(glyph_names: Sequence[str], cards: np.ndarray) -> tuple[GlyphClass, ...]:
    """Selects the glyphs that become classes and assigns them the names of near-duplicates.

    Glyphs are visited by name, simplest first (fewest words, then alphabetically). A glyph whose card differs
    from the blank card and from every selected glyph by at least `DISTINCT_RMS` is selected. Any other glyph
    is a near-duplicate: its name becomes an alias of the nearest selected glyph if both are the same art or
    variants of one drawing (`names.base_name`); otherwise it is dropped, so that no caption names something
    that its image does not show.

    Why 0.067: images that differ by less than the image tokenizer's loss (23.5 dB) may become
    indistinguishable. On the sheet of 1,899 glyphs at 16 px this rule gives 1,881 classes at 0.03, 1,831 at
    0.05, 1,760 at 0.067, 1,710 at 0.08 and 1,578 at 0.1. Connected components at 0.067 would give 1,733, but
    they chain: cloud, keyboard, swan and tooth merge, with ends 0.11 apart. Here any two selected glyphs are
    at least 0.067 apart, and every alias is within 0.067 of its glyph.

    Args:
        glyph_names: cleaned names, one per glyph.
        cards: uint8 [N, S, S, 3], the glyphs on white at `SMALLEST_SIZE`.

    Returns:
        Classes in the order of their selected glyphs.
    """
    order = sorted(
        range(len(glyph_names)), key=lambda i: (glyph_names[i].count(" "), glyph_names[i])
    )
    blank = np.full_like(cards[0], 255)
    nearest = np.full(len(cards), -1)  # -1 is the blank card.
    distance = rms_to(cards, blank)
    members: dict[int, list[int]] = {}
    # Aliases are assigned afterwards, once all selected glyphs are known.
    for i in order:
        if distance[i] >= DISTINCT_RMS:
            members[i] = []
            to_this = rms_to(cards, cards[i])
            nearer = to_this < distance
            nearest[nearer], distance[nearer] = i, to_this[nearer]
    for i in order:
        drawn = int(nearest[i])
        if i == drawn or drawn < 0:
            continue
        same_drawing = names.base_name(glyph_names[i]) == names.base_name(glyph_names[drawn])
        if same_drawing or distance[i] < SAME_ART_RMS:
            members[drawn].append(i)
    return tuple(
        GlyphClass(drawn, tuple(glyph_names[i] for i in (drawn, *members[drawn])))
        for drawn in sorted(members)
    )
