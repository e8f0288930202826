"""How ScaNN searches, and what it is tuned to at each size (docs/results/memory.md)."""

import dataclasses
import math
from typing import Literal

_KINDS = {
    "scoring": ("auto", "brute_force", "hashed", "tree"),
    "reorder": ("auto", "float32", "bfloat16", "int8"),
}
_MIN_TREE_ROWS = 32  # ScaNN trains sixteen centres on what the leaves leave over.
_COUNTS = (
    "min_hashed_rows",
    "min_tree_rows",
    "dims_per_block",
    "training_sample_size",
    "max_rows",
    "num_trees",
)
_OPEN_COUNTS = ("num_reordered", "num_leaves", "leaves_to_search")


@dataclasses.dataclass(frozen=True)
class ScannConfig:
    """How to search; what is `auto` or 0 follows the number of rows.

    Attributes:
        scoring: `brute_force`, `hashed` (asymmetric hashing, then exact reordering), `tree` (both
            within the nearest leaves of a partition), or `auto`: brute force below
            `min_hashed_rows`, hashed below `min_tree_rows`, a tree from there on.
        min_hashed_rows: the size from which hashing is worth its error.
        num_reordered: how many hashed hits are scored exactly, 60 in a tree and else 200 if open;
            raised where k asks for more.
        dims_per_block: dimensions that share one 4-bit code.
        training_sample_size: rows from which the 16 centres of each code are learned. ScaNN's own 100,000
            take three times as long and up to twice the rows' memory, for no recall that can be told.
        anisotropic_threshold: of score-aware quantisation, ScaNN's `T` (arXiv 1908.10396).
        min_tree_rows: the size from which a partition is worth its error.
        num_leaves: of the partition, learned from a hundred rows each.
        leaves_to_search: for each query.
        soar_lambda: writes each row into a second leaf that errs otherwise (SOAR, arXiv 2404.00774), 1.5 as
            a rule; 0 for none, which is faster at the same recall where leaves are found by direction.
        reorder: what exact scores are computed from; `auto` is bfloat16 in a tree, else float32.
        max_rows: the rows of one searcher; a larger index is several, searched one after the other.
        num_trees: that share the rows of an index, where there are trees. While ScaNN builds one it holds two
            more copies of its rows: two are built in 1.9 times the memory of all rows, one in 3.0, but
            searched at half the speed for the same recall, at a million rows at 0.7 of it for a little less.
    """

    scoring: Literal["auto", "brute_force", "hashed", "tree"] = "auto"
    min_hashed_rows: int = 20_000
    num_reordered: int = 0
    dims_per_block: int = 2
    training_sample_size: int = 4_000
    anisotropic_threshold: float = 0.2
    min_tree_rows: int = 100_000
    num_leaves: int = 0
    leaves_to_search: int = 0
    soar_lambda: float = 0.0
    reorder: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    max_rows: int = 50_000_000
    num_trees: int = 1

    def __post_init__(self):
        for name, choices in _KINDS.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {', '.join(choices[:-1])} or {choices[-1]}, "
                    f"not {getattr(self, name)!r}"
                )
        counts = [getattr(self, name) for name in _COUNTS]
        if any(not isinstance(count, int) or count < 1 for count in counts):
            raise ValueError(f"the counts of a ScannConfig are whole and positive: {counts}")
        open_counts = [getattr(self, name) for name in _OPEN_COUNTS]
        if any(not isinstance(count, int) or count < 0 for count in open_counts):
            raise ValueError(f"{_OPEN_COUNTS} are whole, 0 where they are open: {open_counts}")
        reals = (self.anisotropic_threshold, self.soar_lambda)
        if any(not isinstance(value, float) or not 0 <= value < 100 for value in reals):
            raise ValueError(f"threshold and lambda are floats from 0 on, not {reals}")

    def split(self, num_rows: int) -> tuple["ScannConfig", list[int]]:
        """How every searcher of so many rows searches (`scoring` decided), and at which row each begins."""
        fewest = -(-num_rows // self.max_rows)
        scoring = self.resolve(-(-num_rows // max(fewest, 1))).scoring
        count = (
            max(fewest, min(self.num_trees, num_rows // _MIN_TREE_ROWS))
            if scoring == "tree"
            else fewest
        )
        starts = [part * num_rows // count for part in range(count)]
        return dataclasses.replace(self, scoring=scoring), starts

    def resolve(self, num_rows: int) -> "ScannConfig":
        """The same with nothing left open, for one searcher of so many rows."""
        scoring = self.scoring
        if scoring == "auto":
            scoring = "tree" if num_rows >= self.min_tree_rows else "hashed"
            scoring = scoring if num_rows >= self.min_hashed_rows else "brute_force"
        if scoring == "tree" and num_rows < _MIN_TREE_ROWS:
            scoring = "hashed"
        if scoring != "tree":
            return dataclasses.replace(
                self,
                scoring=scoring,
                reorder="float32" if self.reorder == "auto" else self.reorder,
                num_reordered=self.num_reordered or 200,
            )
        leaves = self.num_leaves or round(2 * math.sqrt(num_rows))
        return dataclasses.replace(
            self,
            scoring=scoring,
            reorder="bfloat16" if self.reorder == "auto" else self.reorder,
            num_reordered=self.num_reordered or 60,
            num_leaves=leaves,
            leaves_to_search=min(
                self.leaves_to_search or max(1, round(0.5 * math.sqrt(leaves))), leaves
            ),
        )
