"""Which classes are seen and how often: common, rare_seen and held_out (RA-CM3's unseen entities).

No training image, caption or retrieved document shows a held-out class; a rare one is seen in a
quarter of the usual training scenes.
"""

import functools
import itertools

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.worlds.emoji import art, names

SPLITS = ("common", "rare_seen", "held_out")
RARE_SHARE = 0.15
HELD_OUT_SHARE = 0.15


@functools.cache
def split_of(seed: int = 0) -> np.ndarray:
    """The split of each class, as an index into `SPLITS`: int64 [num_classes], read-only.

    Classes that share a base name (`woman running`, `person running facing right`) fall in one
    split. Flags and the rest are dealt separately, so that each split has its share of flags.
    """
    pictures = art.load_art()
    groups = _related_classes(pictures.names)
    result = np.empty(pictures.num_classes, np.int64)
    for is_flag in (False, True):
        kin = [group for group in groups if pictures.is_flag[group[0]] == is_flag]
        order = np.random.default_rng((seed, int(is_flag))).permutation(len(kin))
        sizes = np.array([len(kin[i]) for i in order])
        # A group belongs where its middle falls, so that a large one shifts no share by its size.
        middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
        split = np.where(middles < HELD_OUT_SHARE, 2, middles < HELD_OUT_SHARE + RARE_SHARE)
        for i, index in zip(order, split, strict=True):
            result[kin[i]] = index
    result.setflags(write=False)
    return result


def classes(*split_names: str, seed: int = 0, share: float = 1.0) -> np.ndarray:
    """The ids of the classes in the named splits, ascending: int64 [N].

    Args:
        split_names: of `SPLITS`.
        seed: of the split.
        share: how much of every split is kept, the first of its classes, and three at the least.

    Raises:
        UserError: a name is not one of `SPLITS`.
    """
    for name in split_names:
        if name not in SPLITS:
            raise UserError(f"There is no split {name!r}; choose from {', '.join(SPLITS)}.")
    ids = [np.flatnonzero(split_of(seed) == SPLITS.index(name)) for name in split_names]
    # Three classes are the fewest of which each can invite another that does not invite it.
    kept = [own[: max(3, round(len(own) * share))] for own in ids]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *kept]))


def _related_classes(class_names: tuple[tuple[str, ...], ...]) -> list[list[int]]:
    """Groups of class ids linked by a base name, directly or through others."""
    group_of_base: dict[str, list[int]] = {}
    for class_id, its_names in enumerate(class_names):
        bases = sorted({names.base_name(name) for name in its_names})
        # One object per linked group, so that joining is relabelling.
        linked = {id(group): group for base in bases if (group := group_of_base.get(base))}
        joined = sorted(itertools.chain([class_id], *linked.values()))
        group_of_base.update(dict.fromkeys(bases, joined))
        for base, group in group_of_base.items():
            if id(group) in linked:
                group_of_base[base] = joined
    unique = {id(group): group for group in group_of_base.values()}
    return sorted(unique.values())
