"""What a run may claim: rules on its numbers that say what is learned and what is not yet.

The rules are RA-CM3's own comparisons in miniature (section 12) with this project's bars. A
difference counts when it exceeds two standard errors: paired by document where the run measured that, else of
the two figures taken as independent.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from rag_mm.report.figures import Figure, find, number, percent

CEILING_BAR = 0.90  # Below it the tokenizer, not the decoder, decides what can be drawn.
SAME_CLASS_BAR = 0.90
SHARE_OF_CEILING = 0.5
REMOVED_WITHIN = 0.05  # Of drawing without documents, once the memory lacks what is asked for.
SEEN_MOVES_BELOW = 0.02  # Where rows of other classes come and go.

Status = Literal["yes", "no", "unknown"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One claim, whether the numbers bear it, and the sentence that says so."""

    claim: str
    status: Status
    sentence: str


def exceeds(high: Figure | None, low: Figure | None) -> bool | None:
    """Whether `high` is above `low` by more than two standard errors of the difference.

    None where a figure or its interval is missing.
    """
    if high is None or low is None:
        return None
    if high.standard_error is None or low.standard_error is None:
        return None
    return high.value - low.value > 2.0 * math.hypot(high.standard_error, low.standard_error)


def differs(
    metrics: Mapping[str, Any], pair: str, high: Figure | None, low: Figure | None
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
    """All claims in the order of the story: codes, retrieval, copying, drawing, memory, captions."""
    return [
        *_parts(metrics),
        *_copying(metrics),
        *_drawing(metrics),
        *_memory_swap(metrics),
        _captions(metrics),
    ]


def _parts(metrics: Mapping[str, Any]) -> list[Verdict]:
    """What the decoder stands on."""
    ceiling = find(metrics, "tokenizer.scorer_ceiling.joint")
    same = find(metrics, "retriever.same_class_at_2")
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
    ]


def _copying(metrics: Mapping[str, Any]) -> list[Verdict]:
    nll0, nll1, nll2 = (find(metrics, f"decoder.art_nll.docs{k}") for k in range(3))
    return [
        _verdict(
            "A document is read",
            differs(metrics, "art_nll_docs1_minus_docs0", nll0, nll1),
            f"One document lowers the NLL per art code from {number(nll0)} to {number(nll1)}.",
            f"One document does not lower the NLL per art code ({number(nll0)} without, "
            f"{number(nll1)} with): the decoder does not copy yet.",
        ),
        _verdict(
            "Two documents are no worse than one",
            _not(differs(metrics, "art_nll_docs2_minus_docs1", nll2, nll1)),
            f"The NLL per art code is {number(nll1)} after one and {number(nll2)} after two.",
            f"The NLL per art code rises from {number(nll1)} after one to {number(nll2)} after "
            "two: the second one confuses.",
        ),
    ]


def _drawing(metrics: Mapping[str, Any]) -> list[Verdict]:

    def at(path: str) -> Figure | None:
        return find(metrics, path)

    ours, vanilla = at("decoder.joint_accuracy.docs2"), at("control.joint_accuracy")
    ceiling, hit = (
        at("tokenizer.scorer_ceiling.joint"),
        at("baselines.hit_itself.joint_accuracy"),
    )
    random = at("baselines.random_documents.joint_accuracy")
    return [
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
            differs(metrics, "joint_docs2_minus_random_documents", ours, random),
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
    ]


def _memory_swap(metrics: Mapping[str, Any]) -> list[Verdict]:
    """Rows of the memory come and go under the same weights."""
    ours, none = (find(metrics, f"decoder.joint_accuracy.{k}") for k in ("docs2", "docs0"))
    removed = find(metrics, "baselines.held_out_removed.joint_accuracy")
    kept = find(metrics, "decoder.paired.joint_held_out_removed_minus_docs0")
    seen = find(metrics, "decoder.seen.paired.joint_docs2_minus_held_out_removed")
    points = "not measured" if seen is None else f"{100 * seen.value:+.1f} points"
    return [
        _verdict(
            "What the memory lacks is not drawn",
            None if kept is None else abs(kept.value) <= REMOVED_WITHIN,
            f"With the held-out rows removed from the memory {percent(removed)} of pictures are "
            f"right, with no documents {percent(none)}.",
            f"With the held-out rows removed from the memory {percent(removed)} of pictures are "
            f"right, with no documents {percent(none)}: other documents change what is drawn.",
        ),
        _verdict(
            "Rows added to the memory bring it back",
            differs(metrics, "joint_docs2_minus_held_out_removed", ours, removed),
            f"The same weights go from {percent(removed)} to {percent(ours)} when the rows are "
            "added: what is known of these entities lies in the memory.",
            f"The same weights go from {percent(removed)} to {percent(ours)} when the rows are "
            "added, which is no gain.",
        ),
        _verdict(
            "Other entities stay as they were",
            None if seen is None else abs(seen.value) < SEEN_MOVES_BELOW,
            f"Adding the rows moves the joint accuracy on seen entities by {points}.",
            f"Adding the rows moves the joint accuracy on seen entities by {points}: "
            "they get in each other's way.",
        ),
    ]


def _captions(metrics: Mapping[str, Any]) -> Verdict:
    cider0, cider2 = (find(metrics, f"decoder.cider.{k}") for k in ("docs0", "docs2"))
    vanilla = find(metrics, "control.cider")
    figures = (
        f"{number(cider2)} with two documents, {number(cider0)} without, {number(vanilla)} for the "
        "vanilla model"
    )
    return _verdict(
        "Captions profit from documents",
        _both(
            differs(metrics, "cider_docs2_minus_docs0", cider2, cider0),
            differs(metrics, "cider_docs2_minus_control", cider2, vanilla),
        ),
        f"CIDEr is {figures}.",
        f"CIDEr is {figures}: captions do not profit yet.",
    )


def headline(metrics: Mapping[str, Any]) -> Verdict:
    """The one sentence under the title: does retrieval draw what the weights never saw?"""
    ours = find(metrics, "decoder.joint_accuracy.docs2")
    vanilla = find(metrics, "control.joint_accuracy")
    return _verdict(
        "Retrieval helps",
        differs(metrics, "joint_docs2_minus_control", ours, vanilla),
        f"Asked to draw what it never saw in training, the model that looks things up gets "
        f"{percent(ours)} of pictures right in every fact; one without a memory, {percent(vanilla)}.",
        f"Retrieval does not help yet: {percent(ours)} of pictures of entities that training "
        f"never showed are right in every fact with two documents, {percent(vanilla)} for the "
        "model without retrieval. What follows shows the machinery, not the skill.",
    )


def _not(holds: bool | None) -> bool | None:
    return None if holds is None else not holds


def _both(one: bool | None, other: bool | None) -> bool | None:
    """Known to fail when one of them does."""
    if one is None or other is None:
        return False if False in (one, other) else None
    return one and other


def _verdict(claim: str, holds: bool | None, if_true: str, if_false: str) -> Verdict:
    if holds is None:
        return Verdict(claim, "unknown", "Not measured, or without an interval: nothing claimed.")
    return Verdict(claim, "yes" if holds else "no", if_true if holds else if_false)
