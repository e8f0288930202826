"""What a run may claim: rules on its numbers that say what is learned and what is not yet.

The rules are RA-CM3's own comparisons in miniature (section 12) with this project's bars. A
difference counts when it exceeds two standard errors: paired by document where the run measured that, else of
the two figures taken as independent.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from rag_mm.report.measured import Measured, find, number, percent

CEILING_BAR = 0.90  # Below it the tokenizer, not the decoder, decides what can be drawn.
SAME_CLASS_BAR = 0.90
SHARE_OF_CEILING = 0.5

Status = Literal["yes", "no", "unknown"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One claim, whether the numbers bear it, and the sentence that says so."""

    claim: str
    status: Status
    sentence: str


def exceeds(high: Measured | None, low: Measured | None) -> bool | None:
    """Whether `high` is above `low` by more than two standard errors of the difference.

    None where a figure or its interval is missing.
    """
    if high is None or low is None:
        return None
    if high.standard_error is None or low.standard_error is None:
        return None
    return high.value - low.value > 2.0 * math.hypot(high.standard_error, low.standard_error)


def differs(
    metrics: Mapping[str, Any], pair: str, high: Measured | None, low: Measured | None
) -> bool | None:
    """`exceeds`, by the difference paired over documents where `decoder.paired` holds one.

    `pair` names it, such as `joint_docs2_minus_control`; which of the two figures is the higher one is read
    off the figures themselves.
    """
    paired = find(metrics, f"decoder.paired.{pair}")
    if paired is None or paired.standard_error is None or high is None or low is None:
        return exceeds(high, low)
    return high.value > low.value and abs(paired.value) > 2.0 * paired.standard_error


def verdicts(metrics: Mapping[str, Any]) -> list[Verdict]:
    """All claims in the order of the story: codes, retrieval, copying, drawing, captions."""

    def at(path: str) -> Measured | None:
        return find(metrics, path)

    ours, vanilla = at("decoder.joint_accuracy.docs2"), at("control.joint_accuracy")
    ceiling, same = at("tokenizer.scorer_ceiling.joint"), at("retriever.same_class_at_2")
    nll0, nll1 = at("decoder.art_nll.docs0"), at("decoder.art_nll.docs1")
    random = at("baselines.random_documents.joint_accuracy")
    hit = at("baselines.hit_itself.joint_accuracy")
    cider0, cider2 = at("decoder.cider.docs0"), at("decoder.cider.docs2")
    return [
        _verdict(
            "The codes keep the facts",
            None if ceiling is None else ceiling.value >= CEILING_BAR,
            f"After the tokenizer alone, {percent(ceiling)} of pictures still show the right "
            "entity, place and colour.",
            f"After the tokenizer alone, only {percent(ceiling)} of pictures still show the "
            "right entity, place and colour: it loses too much, whatever the decoder does.",
        ),
        _verdict(
            "Retrieval brings the right entity",
            None if same is None else same.value >= SAME_CLASS_BAR,
            f"{percent(same)} of the retrieved documents show the entity asked for.",
            f"Only {percent(same)} of the retrieved documents show the entity asked for; "
            "the decoder cannot copy what it is not shown.",
        ),
        _verdict(
            "A document is read",
            differs(metrics, "art_nll_docs1_minus_docs0", nll0, nll1),
            f"One document lowers the NLL per art code from {number(nll0)} to {number(nll1)}.",
            f"One document does not lower the NLL per art code ({number(nll0)} without, "
            f"{number(nll1)} with): the decoder does not copy yet.",
        ),
        _verdict(
            "Retrieval helps",
            differs(metrics, "joint_docs2_minus_control", ours, vanilla),
            f"With two documents {percent(ours)} of pictures are right in every fact; "
            f"the vanilla model reaches {percent(vanilla)}.",
            f"Retrieval does not help yet: with two documents {percent(ours)} of pictures are "
            f"right in every fact, and the vanilla model reaches {percent(vanilla)}.",
        ),
        _verdict(
            "It is the content of the documents that helps",
            exceeds(ours, random),
            f"Documents drawn by lot give {percent(random)}.",
            f"Documents drawn by lot do as well ({percent(random)}): "
            "what they show is not used yet.",
        ),
        _verdict(
            "It composes rather than hands back",
            differs(metrics, "joint_docs2_minus_hit_itself", ours, hit),
            f"Handing back the retrieved picture itself would be right in {percent(hit)}.",
            f"Handing back the retrieved picture itself is right in {percent(hit)}, "
            "which the decoder does not beat yet.",
        ),
        _verdict(
            "It reaches half of what is possible",
            None
            if ours is None or ceiling is None
            else ours.value >= SHARE_OF_CEILING * ceiling.value,
            f"Joint accuracy is {percent(ours)}, the ceiling {percent(ceiling)}.",
            f"Joint accuracy is {percent(ours)}, below half of the ceiling of {percent(ceiling)}.",
        ),
        _verdict(
            "Captions profit from documents",
            differs(metrics, "cider_docs2_minus_docs0", cider2, cider0),
            f"CIDEr rises from {number(cider0)} without documents to {number(cider2)} with two.",
            f"CIDEr is {number(cider0)} without documents and {number(cider2)} with two: "
            "captions do not profit yet.",
        ),
    ]


def headline(metrics: Mapping[str, Any]) -> Verdict:
    """The one sentence under the title: does retrieval draw what the weights never saw?"""
    ours = find(metrics, "decoder.joint_accuracy.docs2")
    vanilla = find(metrics, "control.joint_accuracy")
    return _verdict(
        "Retrieval helps",
        differs(metrics, "joint_docs2_minus_control", ours, vanilla),
        f"With two retrieved documents, {percent(ours)} of pictures of entities that training "
        f"never showed are right in every fact; without retrieval, {percent(vanilla)}.",
        f"Retrieval does not help yet: {percent(ours)} of pictures of entities that training "
        f"never showed are right in every fact with two documents, {percent(vanilla)} for the "
        "model without retrieval. What follows shows the machinery, not the skill.",
    )


def _verdict(claim: str, holds: bool | None, if_true: str, if_false: str) -> Verdict:
    if holds is None:
        return Verdict(claim, "unknown", "Not measured, or without an interval: nothing claimed.")
    return Verdict(claim, "yes" if holds else "no", if_true if holds else if_false)
