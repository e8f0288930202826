"""The split of the emoji classes into common, rare_seen, tune and test.

`held_out` names tune and test together: RA-CM3's unseen entities. Decoder, baseline and image tokenizer never
train on a held-out class; a retriever does unless its `splits` exclude them. Checks, and every choice of a
setting, read `tune` classes; tables read `test` classes. A rare class has a quarter of the training scenes of
a common one.
"""

import functools
import itertools

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.worlds.emoji import art, names

SPLITS = ("common", "rare_seen", "tune", "test")
HELD_OUT = ("tune", "test")
GROUPS = {"held_out": HELD_OUT}  # Names that stand for several splits.
# Upper ends of the shares of test, tune and rare classes; the rest is common.
SHARES = {"test": 0.075, "tune": 0.15, "rare_seen": 0.3}


@functools.cache
def split_of(seed: int = 0) -> np.ndarray:
    """The split of each class, as an index into `SPLITS`: int64 [num_classes], read-only.

    Classes that share a base name (`woman running`, `person running facing right`) are in the same
    split. Flags and other classes are split separately, so that each split has its share of flags.
    """
    emoji_art = art.load_art()
    groups = _related_classes(emoji_art.names)
    result = np.empty(emoji_art.num_classes, np.int64)
    for is_flag in (False, True):
        members = [group for group in groups if emoji_art.is_flag[group[0]] == is_flag]
        order = np.random.default_rng((seed, int(is_flag))).permutation(len(members))
        sizes = np.array([len(members[i]) for i in order])
        # The midpoint of a group decides, so that large groups do not bias the shares.
        midpoints = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
        names_in_order = [*SHARES, "common"]
        split = np.searchsorted(list(SHARES.values()), midpoints, side="right")
        for i, position in zip(order, split, strict=True):
            result[members[i]] = SPLITS.index(names_in_order[position])
    result.setflags(write=False)
    return result


def classes(*split_names: str, seed: int = 0, share: float = 1.0) -> np.ndarray:
    """The ids of the classes in the named splits, ascending: int64 [N].

    Args:
        split_names: members of `SPLITS`, or `held_out`.
        seed: seed of the split.
        share: fraction of every split to keep, lowest ids first, at least three classes.

    Raises:
        UserError: there is no split of that name.
    """
    ids = [np.flatnonzero(split_of(seed) == SPLITS.index(name)) for name in expand(*split_names)]
    # With fewer than three classes, partners of pairs could not be chosen in one direction only.
    kept = [members[: max(3, round(len(members) * share))] for members in ids]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *kept]))


def expand(*split_names: str) -> tuple[str, ...]:
    """The splits that some names stand for: `held_out` becomes tune and test.

    Raises:
        UserError: there is no split of that name.
    """
    for name in split_names:
        if name not in SPLITS and name not in GROUPS:
            known = ", ".join((*SPLITS, *GROUPS))
            raise UserError(f"There is no split {name!r}; choose from {known}.")
    return tuple(split for name in split_names for split in GROUPS.get(name, (name,)))


def _related_classes(class_names: tuple[tuple[str, ...], ...]) -> list[list[int]]:
    """Groups of class ids connected by shared base names (connected components)."""
    group_of_base: dict[str, list[int]] = {}
    for class_id, aliases in enumerate(class_names):
        bases = sorted({names.base_name(name) for name in aliases})
        # Connected bases share one list object, so merging groups means replacing it.
        linked = {id(group): group for base in bases if (group := group_of_base.get(base))}
        joined = sorted(itertools.chain([class_id], *linked.values()))
        group_of_base.update(dict.fromkeys(bases, joined))
        for base, group in group_of_base.items():
            if id(group) in linked:
                group_of_base[base] = joined
    unique = {id(group): group for group in group_of_base.values()}
    return sorted(unique.values())
