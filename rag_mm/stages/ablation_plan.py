"""What a config's `ablation` part holds: variants, seeds, and the figures of their table."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rag_mm.eval import ablation_table

KEY = "ablation"  # of a config


@dataclasses.dataclass(frozen=True)
class AblationPlan:
    """The variants and seeds of an ablation, and the figures of its table.

    Where neither `figures` nor `pairs` are given, the table shows all figures that every cell has.

    Attributes:
        variants: name -> the settings it overrides, as {"decoder.alpha": 1.0}.
        seeds: each variant is run with each seed.
        figures: dotted paths into the stage's `per_document.json`, such as "held_out.docs2.joint".
        pairs: pairs of figures; the table shows the first minus the second, paired by document.
        baseline: the variant that the others are compared with.
        stage: the stage whose figures are compared.
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
            raise ValueError("variants are a dict of dicts, {name: {dotted key: value}}")
        if not all(isinstance(seed, int) for seed in self.seeds):
            raise ValueError(f"seeds are integers, not {self.seeds}")
        if any("seed" in each for each in overrides):
            raise ValueError("a variant has no seed of its own; `seeds` are for all")
        if self.baseline is not None and self.baseline not in self.variants:
            names = ", ".join(self.variants)
            raise ValueError(
                f"the baseline {self.baseline!r} is not a variant, choose from {names}"
            )
        for pair in self.pairs:
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"a pair is two figures, not {pair!r}")

    @property
    def order(self) -> tuple[str, ...]:
        """The variants' names, the baseline first."""
        return tuple(sorted(self.variants, key=lambda name: name != self.baseline))

    @property
    def columns(self) -> tuple[str, ...]:
        """Figures and pairs, as `eval.ablation_table` writes them."""
        return (*self.figures, *(ablation_table.MINUS.join(pair) for pair in self.pairs))
