"""ScaNN's settings and their defaults by number of rows (measured in docs/results/memory.md)."""

import dataclasses
import math
from typing import Literal

_KINDS = {
    "scoring": ("auto", "brute_force", "hashed", "tree"),
    "reorder": ("auto", "float32", "bfloat16", "int8"),
}
_MIN_TREE_ROWS = 32  # ScaNN trains sixteen centers on the residuals of the leaves.
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
    """Search settings; a value of `auto` or 0 is chosen by the number of rows.

    Attributes:
        scoring: `brute_force`, `hashed` (asymmetric hashing, then exact reordering), `tree` (the same
            within the nearest leaves of a partition), or `auto`: brute force below `min_hashed_rows`,
            hashed below `min_tree_rows`, else a tree.
        min_hashed_rows: number of rows from which `auto` uses hashing.
        num_reordered: number of hashed hits that are scored exactly; 0 means 60 in a tree, else 200. At
            least 2 k are always reordered.
        dims_per_block: dimensions that share one 4-bit code.
        training_sample_size: rows from which the 16 centers of each code are learned. ScaNN's default of
            100,000 takes three times as long and up to twice the rows' memory, without a measurable gain
            in recall.
        anisotropic_threshold: ScaNN's `T` of score-aware quantization (arXiv 1908.10396).
        min_tree_rows: number of rows from which `auto` uses a tree.
        num_leaves: leaves of the partition, learned from 100 rows each; 0 means 2 sqrt(rows).
        leaves_to_search: leaves searched per query; 0 means 0.5 sqrt(num_leaves).
        soar_lambda: writes each row into a second leaf whose error differs (SOAR, arXiv 2404.00774); 1.5 is
            typical, 0 disables it. Without it search is faster at equal recall when leaves are spherical.
        reorder: dtype from which exact scores are computed; `auto` is bfloat16 in a tree, else float32.
        max_rows: maximum rows per searcher; a larger index has several, searched one after the other.
        num_trees: trees that share the rows of a `tree` index. While ScaNN builds a tree it holds two more
            copies of its rows, so building one tree takes 3.0 times the memory of all rows and two trees 1.9
            times. Two trees are searched at half the speed for the same recall, or, at a million rows, at 0.7
            of the speed for slightly lower recall.
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
                    f"{name} is {getattr(self, name)!r}; "
                    f"give {', '.join(choices[:-1])} or {choices[-1]}"
                )
        counts = [getattr(self, name) for name in _COUNTS]
        if any(not isinstance(count, int) or count < 1 for count in counts):
            raise ValueError(f"{_COUNTS} are positive integers, not {counts}")
        open_counts = [getattr(self, name) for name in _OPEN_COUNTS]
        if any(not isinstance(count, int) or count < 0 for count in open_counts):
            raise ValueError(f"{_OPEN_COUNTS} are integers >= 0 (0: automatic), not {open_counts}")
        reals = (self.anisotropic_threshold, self.soar_lambda)
        if any(not isinstance(value, float) or not 0 <= value < 100 for value in reals):
            raise ValueError(
                f"anisotropic_threshold and soar_lambda are floats in [0, 100), not {reals}"
            )

    def split(self, num_rows: int) -> tuple["ScannConfig", list[int]]:
        """Divides `num_rows` rows over searchers: their settings (`scoring` resolved) and first rows."""
        min_count = -(-num_rows // self.max_rows)
        scoring = self.resolve(-(-num_rows // max(min_count, 1))).scoring
        count = (
            max(min_count, min(self.num_trees, num_rows // _MIN_TREE_ROWS))
            if scoring == "tree"
            else min_count
        )
        starts = [part * num_rows // count for part in range(count)]
        return dataclasses.replace(self, scoring=scoring), starts

    def resolve(self, num_rows: int) -> "ScannConfig":
        """The settings for one searcher of `num_rows` rows, with every `auto` and 0 replaced."""
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
