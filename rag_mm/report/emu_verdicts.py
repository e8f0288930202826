"""Which claims an Emu's figures support: what is required, what was measured, and whether it holds."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rag_mm.report import figures
from rag_mm.report.figures import Figure, find
from rag_mm.report.verdicts import Status

# Required values at the size of the page `emu:quick`.
MAX_TEXT_CE, MIN_R2 = 0.6, {"oracle": 0.7, "none": 0.5}
MIN_RATIO, MIN_VARIANCE = 5.0, 0.1
MIN_READ = {"entity": 0.4, "place": 0.95, "color": 0.95}
NUM_CANDIDATES = 32  # Among which an image is found.
MIN_RANDOM, MIN_OWN, MAX_SHUFFLED = 0.6, 0.9, 0.08
MIN_EXACT = {"oracle": 0.8, "none": 0.35}
MIN_HELD_OUT_FACT = 0.9
MIN_SAME, MAX_SAME_WITHOUT = 0.8, 0.2
CHANCE_DIRECTION = 0.25
MAX_NLL_TO_TEXT_ALONE = 1.1


@dataclasses.dataclass(frozen=True)
class EmuClaim:
    """A claim, what it requires, what was measured, both in words, and whether it holds."""

    claim: str
    required: str
    measured: str
    status: Status


def claims(metrics: Mapping[str, Any]) -> list[EmuClaim]:
    """All claims about the metrics of the stages `emu` and `emu_figures`, the latter under its name."""
    found = metrics.get("emu_figures", {})
    return [*_losses(metrics), *_codes(found), *_images(found), *_texts(found), *_memory(found)]


def _losses(metrics: Mapping[str, Any]) -> list[EmuClaim]:
    held_out = metrics.get("emu_figures", {}).get("held_out", {})
    r2 = {name: find(held_out, f"r2.{name}") for name in MIN_R2}
    joint = find(metrics, "emu_figures.nll_to_text_alone.seen.none")
    return [
        _claim(
            "Text is learned",
            f"cross-entropy at most {MAX_TEXT_CE:g} nats",
            [(find(metrics, "emu.train.text_ce"), None, MAX_TEXT_CE)],
            is_share=False,
        ),
        _claim(
            "Images are predicted from captions of held-out classes",
            f"R2 at least {MIN_R2['oracle']:g} with a document, {MIN_R2['none']:g} without",
            [(r2[name], least, None) for name, least in MIN_R2.items()],
            is_share=False,
        ),
        _claim(
            "Learning images costs captions little",
            f"NLL of captions of seen classes at most {MAX_NLL_TO_TEXT_ALONE:g} times that of a run on text "
            "alone",
            [(joint, None, MAX_NLL_TO_TEXT_ALONE)],
            is_share=False,
        ),
    ]


def _codes(found: Mapping[str, Any]) -> list[EmuClaim]:
    read = [
        (find(found, f"held_out.read_{fact}.encoded"), least, None)
        for fact, least in MIN_READ.items()
    ]
    return [
        _claim(
            "Codes have not collapsed",
            f"participation ratio at least {MIN_RATIO:g}, variance at least {MIN_VARIANCE:.0%} of the "
            "initial one",
            [
                (find(found, "codes.participation_ratio"), MIN_RATIO, None),
                (find(found, "codes.variance_to_initial"), MIN_VARIANCE, None),
            ],
            is_share=False,
        ),
        _claim(
            "A linear map reads the facts from codes of held-out classes",
            "entity at least 40 %, place and color at least 95 %",
            read,
        ),
    ]


def _images(found: Mapping[str, Any]) -> list[EmuClaim]:
    return [
        _claim(
            "A caption's rollout finds its image",
            f"among {NUM_CANDIDATES} at least {MIN_RANDOM:.0%}, among its class's scenes at least "
            f"{MIN_OWN:.0%}, with another's caption at most {MAX_SHUFFLED:.0%}",
            [
                (_among(found, "random", "none"), MIN_RANDOM, None),
                (find(found, "held_out.own.none"), MIN_OWN, None),
                (_among(found, "random", "shuffled"), None, MAX_SHUFFLED),
            ],
        )
    ]


def _texts(found: Mapping[str, Any]) -> list[EmuClaim]:
    exact = [(find(found, f"seen.exact.{name}"), least, None) for name, least in MIN_EXACT.items()]
    facts = [
        (find(found, f"held_out.{name}.oracle"), MIN_HELD_OUT_FACT, None)
        for name in ("place", "color")
    ]
    ours, control = (
        find(found, f"held_out_clips.direction.{name}") for name in ("in_order", "shuffled_frames")
    )
    paired = find(found, "held_out_clips.paired.direction_in_order_minus_shuffled_frames")
    return [
        _claim(
            "Captions of seen classes are exact",
            f"at least {MIN_EXACT['oracle']:.0%} with a document, {MIN_EXACT['none']:.0%} without",
            exact,
        ),
        _claim(
            "Captions of held-out classes have place and color",
            f"each at least {MIN_HELD_OUT_FACT:.0%} with a document",
            facts,
        ),
        EmuClaim(
            "The direction of a clip's motion is read from the order of its frames",
            "above 25 % and above shuffled frames by two standard errors",
            f"{figures.percent(ours)}; shuffled {figures.percent(control)}",
            _status(
                None
                if ours is None or paired is None or paired.standard_error is None
                else ours.value - 2 * (ours.standard_error or 0) > CHANCE_DIRECTION
                and paired.value > 2 * paired.standard_error
            ),
        ),
    ]


def _memory(found: Mapping[str, Any]) -> list[EmuClaim]:
    names = ("oracle", "none", "wrong", "retrieved")
    same = {name: _among(found, "same", name) for name in names}
    paired = find(found, "held_out.paired.same_oracle_minus_none")
    ours, without, wrong = same["oracle"], same["none"], same["wrong"]
    holds = None
    if ours and without and wrong and paired and paired.standard_error is not None:
        is_high = ours.value >= MIN_SAME and without.value <= MAX_SAME_WITHOUT
        is_read = wrong.value <= MAX_SAME_WITHOUT
        holds = is_high and is_read and paired.value > 2 * paired.standard_error
    return [
        EmuClaim(
            "A document shows what a held-out entity looks like",
            f"right of {NUM_CANDIDATES} of one place and color at least {MIN_SAME:.0%} with a document of "
            f"its class, at most {MAX_SAME_WITHOUT:.0%} without or with another's",
            "; ".join(f"{name} {figures.percent(figure)}" for name, figure in same.items()),
            _status(holds),
        )
    ]


def _among(found: Mapping[str, Any], figure: str, documents: str) -> Figure | None:
    """A share of held-out images that were found; None if it was among another number than is required."""
    count = found.get("held_out", {}).get("candidates", {}).get(figure, NUM_CANDIDATES)
    return find(found, f"held_out.{figure}.{documents}") if count == NUM_CANDIDATES else None


def _claim(
    claim: str,
    required: str,
    bounds: Sequence[tuple[Figure | None, float | None, float | None]],
    is_share: bool = True,
) -> EmuClaim:
    """A claim that holds if each figure is at least and at most its bounds."""
    show = figures.percent if is_share else figures.number
    holds: bool | None = True
    for figure, least, most in bounds:
        if figure is None:
            holds = None
            break
        is_high = least is None or figure.value >= least
        holds = bool(holds and is_high and (most is None or figure.value <= most))
    measured = ", ".join(show(figure) for figure, _, _ in bounds)
    return EmuClaim(claim, required, measured, _status(holds))


def _status(holds: bool | None) -> Status:
    return "unknown" if holds is None else "yes" if holds else "no"
