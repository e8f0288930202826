"""What the claims about decoding are judged by: the figures of every setting, paired by scene."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from rag_mm.eval import statistics
from rag_mm.stages.cm3leon import decoding_settings
from rag_mm.stages.cm3leon.decoding_settings import DecodingStageConfig


@dataclasses.dataclass(frozen=True)
class DecodingClaim:
    """A claim, what it requires, what was measured, and whether that meets it; None: only reported."""

    claim: str
    required: str
    measured: str
    is_met: bool | None


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The figures of all settings, [Q] each, and the codes of those that were drawn, int32 [Q, N]."""

    config: DecodingStageConfig
    values: Mapping[str, Mapping[str, np.ndarray]]
    codes: Mapping[str, np.ndarray]

    def mean(self, name: str, figure: str = "joint") -> float:
        """Mean of a figure over scenes."""
        return float(self.values[name][figure].mean())

    def gain(self, ours: str, theirs: str) -> tuple[float, float]:
        """Joint accuracy of `ours` minus `theirs`, paired by scene, and its standard error."""
        difference = statistics.paired_difference(
            self.values[ours]["joint"], self.values[theirs]["joint"]
        )
        return float(difference["mean"]), float(difference["standard_error"])

    def share_equal(self, ours: str, theirs: str) -> float:
        """Share of scenes whose codes are all equal."""
        return float((self.codes[ours] == self.codes[theirs]).all(axis=1).mean())

    def has(self, *names: str) -> bool:
        """Whether all of these settings were measured."""
        return all(name in self.values for name in names)


def guided_name(null: str, weight: float, temperature: float, plausible: float = 0.0) -> str:
    """Name of a setting of guidance."""
    return decoding_settings.guided(null, weight, temperature, plausible).name


def plain_name(temperature: float) -> str:
    """Name of a setting of plain sampling."""
    return decoding_settings.plain(temperature).name
