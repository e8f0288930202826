"""The `ablation` section of a config: variants, seeds, and the figures of their table."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rag_mm.eval import ablation_table

KEY = "ablation"  # Key of the section in a config.


@dataclasses.dataclass(frozen=True)
class AblationPlan:
    """The variants and seeds of an ablation, and the figures of its table.

    If neither `figures` nor `pairs` are given, the table shows all figures that every cell has.

    Attributes:
        variants: name -> overridden settings, such as {"decoder.alpha": 1.0}.
        seeds: every variant runs with every seed.
        figures: dotted paths into the stage's `per_document.json`, such as "held_out.docs2.joint".
        pairs: pairs of figures; the table shows the first minus the second, paired by document.
        baseline: the variant that the others are compared with.
        stage: stage whose figures are compared.
    """

    variants: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...] = (0, 1, 2)
    figures: tuple[str, ...] = ()
    pairs: tuple[Sequence[str], ...] = ()
    baseline: str | None = None
    stage: str = "evaluation"

    def __post_init__(self):
        overrides = self.variants.values() if isinstance(self.variants, Mapping) else [None]
        if not all(isinstance(each, Mapping) for each in overrides):
            raise ValueError("variants must be a dict of dicts, {name: {dotted key: value}}")
        if not all(isinstance(seed, int) for seed in self.seeds):
            raise ValueError(f"seeds must be integers, not {self.seeds}")
        if any("seed" in each for each in overrides):
            raise ValueError(
                "a variant cannot set the seed; use `seeds`, which apply to all variants"
            )
        if self.baseline is not None and self.baseline not in self.variants:
            names = ", ".join(self.variants)
            raise ValueError(
                f"the baseline {self.baseline!r} is not a variant; choose from {names}"
            )
        for pair in self.pairs:
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"a pair must be two figures, not {pair!r}")

    @property
    def order(self) -> tuple[str, ...]:
        """The variants' names, the baseline first."""
        return tuple(sorted(self.variants, key=lambda name: name != self.baseline))

    @property
    def needed(self) -> tuple[str, ...]:
        """The figures that the table is made of; () for all."""
        return tuple(
            dict.fromkeys([*self.figures, *(name for pair in self.pairs for name in pair)])
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Figures and pairs, as `eval.ablation_table` writes them."""
        return (*self.figures, *(ablation_table.MINUS.join(pair) for pair in self.pairs))
