"""Which claims about a tuned decoder its scores support, with thresholds fixed beforehand."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from rag_mm.eval import over_reliance, statistics
from rag_mm.stages.cm3leon import edit_guidance, scene_instructions
from rag_mm.stages.cm3leon.decoding_results import DecodingClaim
from rag_mm.stages.cm3leon.edit_guidance import Weights
from rag_mm.stages.cm3leon.scene_instructions import TEXT_TO_IMAGE

UNTUNED, TUNED = "untuned", "tuned"
Scores = dict[str, list[float]]
# By task: what is required, and what is hoped for.
GATES = {
    "recolor": 0.5,
    "move": 0.65,
    "draw_boxes": 0.5,
    "swap": 0.28,
    "from_silhouette": 0.28,
    "caption": 0.3,
    "what": 0.5,
}
AIMS = {
    "recolor": 0.8,
    "move": 0.8,
    "draw_boxes": 0.65,
    "swap": 0.5,
    "from_silhouette": 0.5,
    "caption": 0.5,
    "what": 0.75,
    "where": 0.6,
    "which_color": 0.6,
}
GAIN, KEPT_WITHIN = 0.25, 0.05
FIDELITY_GAIN, COMPLIANCE_GAIN, GUIDED_WITHIN = 0.3, 0.5, 0.05


def scored_name(decoder: str, task: str) -> str:
    """The name of a decoder's scores of a task, in files and among figures."""
    return f"{decoder}_{task}"


def copied_name(decoder: str) -> str:
    """The name of what a decoder's pictures have from documents against their captions."""
    return f"{decoder}_copied"


def claims(values: Mapping[str, Scores], weights: Sequence[Weights]) -> list[DecodingClaim]:
    """The claims for which there are scores.

    Args:
        values: {name: {figure: one value per item}}.
        weights: those of picture and instruction with which edits were drawn.
    """
    return [*_tasks(values), *_guidance(values, weights), *_over_reliance(values)]


def _mean(values: Mapping[str, Scores], name: str, figure: str) -> float:
    return float(np.mean(values[name][figure]))


def _tasks(values: Mapping[str, Scores]) -> Iterator[DecodingClaim]:
    for name, task in scene_instructions.TASKS.items():
        if scored_name(TUNED, name) not in values:
            continue
        before, after = (
            _mean(values, scored_name(decoder, name), task.figure) for decoder in (UNTUNED, TUNED)
        )
        measured = f"{after:.3f}, before {before:.3f}"
        if name == TEXT_TO_IMAGE:
            yield DecodingClaim(
                f"{name} is kept",
                f"at most {KEPT_WITHIN:g} below before",
                measured,
                after >= before - KEPT_WITHIN,
            )
            continue
        gate = GATES.get(name, 0.0)
        required = f"before + {GAIN:g}" + (f", and {gate:g}" if gate else "")
        is_met = after >= before + GAIN and after >= gate
        yield DecodingClaim(f"{name} is learnt", required, measured, is_met)
        if name in AIMS:
            aim = f"aim {AIMS[name]:g}"
            yield DecodingClaim(f"{name} reaches its aim", aim, f"{after:.3f}", after >= AIMS[name])


def _guidance(values: Mapping[str, Scores], weights: Sequence[Weights]) -> Iterator[DecodingClaim]:
    for task in edit_guidance.EDITS:
        measured = edit_guidance.measured(weights, values, task)

        def at(pair: Weights, figure: str, task: str = task) -> float:
            return _mean(values, edit_guidance.name(task, pair), figure)

        for pair, figure, what, least in (
            ((0.0, 1.0), "fidelity", "image", FIDELITY_GAIN),
            ((1.0, 0.0), "compliance", "text", COMPLIANCE_GAIN),
        ):
            if pair in measured:
                low, high = at(pair, figure), at(edit_guidance.PLAIN, figure)
                yield DecodingClaim(
                    f"{task}: {what} weight 0 to 1 raises {figure}",
                    f"by {least:g}",
                    f"{low:.3f} to {high:.3f}, {high - low:+.3f}",
                    high - low >= least,
                )
        if (1.5, 1.0) in measured:
            found, plain = (at(pair, "joint") for pair in ((1.5, 1.0), edit_guidance.PLAIN))
            yield DecodingClaim(
                f"{task}: image weight 1.5 is as good as 1",
                f"within {GUIDED_WITHIN:g}",
                f"joint {found:.3f}, {found - plain:+.3f}",
                found >= plain - GUIDED_WITHIN,
            )
        if much := [pair for pair in measured if max(pair) >= 2]:
            yield DecodingClaim(
                f"{task}: weights from 2",
                "reported",
                "joint " + ", ".join(f"{at(p, 'joint'):.3f} at {p[0]:g}/{p[1]:g}" for p in much),
                None,
            )


def _over_reliance(values: Mapping[str, Scores]) -> Iterator[DecodingClaim]:
    before, after = (values.get(copied_name(decoder)) for decoder in (UNTUNED, TUNED))
    if before is None or after is None:
        return
    for figure, most in over_reliance.AT_MOST.items():
        what = {"copied_whole": "whole image"}.get(figure, figure.removeprefix("copied_"))
        difference = statistics.paired_difference(after[figure], before[figure])
        rise, error = float(difference["mean"]), float(difference["standard_error"])
        share = float(np.mean(after[figure]))
        yield DecodingClaim(
            f"A document's {what} is copied against the caption no more than before tuning",
            f"at most {most:g}, or within 2 standard errors of before",
            f"{share:.3f}, {rise:+.3f} ± {error:.3f}",
            share <= most or rise <= 2 * error,
        )
