"""Which claims the figures of a visual decoder support; thresholds are fixed, whatever was measured."""

from collections.abc import Mapping
from typing import Any

from rag_mm.report import figures
from rag_mm.report.emu_verdicts import EmuClaim
from rag_mm.report.figures import Figure, find
from rag_mm.report.verdicts import Status

MIN_FACT = 0.95
CHANCE, MAX_FROM_CHANCE = {"place": 0.25, "color": 0.125}, 0.12
MIN_ROLLOUT_GAIN, MIN_DOCUMENT_GAIN = 0.05, 0.08
_GUIDED, _PLAIN = "guidance_2", "guidance_1"


def claims(found: Mapping[str, Any]) -> list[EmuClaim]:
    """All claims about the metrics of the stage `visual_figures`, those of test scenes of test classes."""
    held_out = found.get("held_out", {})
    return [
        _facts(held_out),
        _null(held_out),
        _rollouts(held_out),
        _guidance(held_out),
        _document(held_out),
    ]


def relative_gain(found: Mapping[str, Any], ours: str, theirs: str) -> Figure | None:
    """By what share the error of `ours` is below that of `theirs`, with the interval of the difference."""
    base = find(found, f"mse.{theirs}")
    paired = find(found, f"paired.mse_{ours}_minus_{theirs}")
    if base is None or paired is None or not base.value:
        return None
    ci95 = None if paired.ci95 is None else paired.ci95 / base.value
    return Figure(-paired.value / base.value, ci95, paired.n)


def _facts(found: Mapping[str, Any]) -> EmuClaim:
    facts = [find(found, f"{fact}.none") for fact in CHANCE]
    return EmuClaim(
        "Images drawn from captions of held-out classes show place and color",
        f"each at least {MIN_FACT:.0%}",
        ", ".join(map(figures.percent, facts)),
        _status(None if None in facts else all(each.value >= MIN_FACT for each in facts if each)),
    )


def _null(found: Mapping[str, Any]) -> EmuClaim:
    facts = {fact: find(found, f"{fact}.null") for fact in CHANCE}
    distances = [abs(each.value - CHANCE[fact]) for fact, each in facts.items() if each is not None]
    is_known = len(distances) == len(facts)
    return EmuClaim(
        "The empty prompt's images say nothing of the caption",
        f"place and color within {100 * MAX_FROM_CHANCE:.0f} points of chance, 25 % and 12.5 %",
        ", ".join(map(figures.percent, facts.values())),
        _status(max(distances) <= MAX_FROM_CHANCE if is_known else None),
    )


def _rollouts(found: Mapping[str, Any]) -> EmuClaim:
    gain = relative_gain(found, "none", "control_none")
    place, control = (find(found, f"place.{name}") for name in ("none", "control_none"))
    holds = None
    if place and control:
        holds = _is_gain(gain, MIN_ROLLOUT_GAIN)
        holds = None if holds is None else holds and place.value >= control.value
    return EmuClaim(
        "Training on rollouts beats training on the encoder's codes, where both draw from rollouts",
        f"error lower by at least {MIN_ROLLOUT_GAIN:.0%} and two standard errors, place not lower",
        f"error lower by {figures.percent(gain)}; place {figures.percent(place)}, "
        f"{figures.percent(control)}",
        _status(holds),
    )


def _guidance(found: Mapping[str, Any]) -> EmuClaim:
    gain = relative_gain(found, _GUIDED, _PLAIN)
    return EmuClaim(
        "Guidance lowers the error",
        "at 2 below that at 1 by two standard errors",
        f"error lower by {figures.percent(gain)}",
        _status(_is_gain(gain, 0)),
    )


def _document(found: Mapping[str, Any]) -> EmuClaim:
    gains = [relative_gain(found, name, "none") for name in ("retrieved", "oracle")]
    return EmuClaim(
        "A retrieved document brings the image closer",
        f"error lower by at least {MIN_DOCUMENT_GAIN:.0%} and two standard errors",
        f"error lower by {figures.percent(gains[0])}; a document of its class "
        f"{figures.percent(gains[1])}",
        _status(_is_gain(gains[0], MIN_DOCUMENT_GAIN)),
    )


def _is_gain(gain: Figure | None, least: float) -> bool | None:
    """Whether a gain is at least `least`, and above 0 by two standard errors."""
    if gain is None or gain.standard_error is None:
        return None
    return gain.value >= least and gain.value > 2 * gain.standard_error


def _status(holds: bool | None) -> Status:
    return "unknown" if holds is None else "yes" if holds else "no"
