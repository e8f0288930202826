"""Which claims a run's metrics support, by fixed rules.

The rules are RA-CM3's comparisons in miniature (docs/papers/ra_cm3.md) with this project's thresholds. A
difference counts when it exceeds two standard errors: of the paired difference where the run measured it,
otherwise of two independent estimates.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from rag_mm.eval import over_reliance
from rag_mm.report.figures import Figure, find, number, percent

CEILING_BAR = 0.90  # Below it the tokenizer, not the decoder, limits accuracy.
SAME_CLASS_BAR = 0.90
SHARE_OF_CEILING = 0.5
REMOVED_WITHIN = 0.05  # Of accuracy without documents, once the memory lacks the entity.
SEEN_MOVES_BELOW = 0.02  # Change on seen entities when documents of others are added.

Status = Literal["yes", "no", "unknown"]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim, whether the metrics support it, and the sentence that states the numbers."""

    claim: str
    status: Status
    sentence: str


def exceeds(high: Figure | None, low: Figure | None) -> bool | None:
    """Whether `high` is above `low` by more than two standard errors of the difference.

    None if a figure or its interval is missing.
    """
    if high is None or low is None:
        return None
    if high.standard_error is None or low.standard_error is None:
        return None
    return high.value - low.value > 2.0 * math.hypot(high.standard_error, low.standard_error)


def differs(
    metrics: Mapping[str, Any], pair: str, high: Figure | None, low: Figure | None
) -> bool | None:
    """As `exceeds`, but with the paired difference `decoder.paired.PAIR` where it was measured.

    `pair` is a name such as `joint_docs2_minus_control`. The direction is taken from `high` and `low`, the
    standard error from the paired difference.
    """
    paired = find(metrics, f"decoder.paired.{pair}")
    if paired is None or paired.standard_error is None or high is None or low is None:
        return exceeds(high, low)
    return high.value > low.value and abs(paired.value) > 2.0 * paired.standard_error


def verdicts(metrics: Mapping[str, Any]) -> list[Verdict]:
    """All claims: tokenizer, retrieval, copying, generation, memory, captions."""
    return [
        *_components(metrics),
        *_copying(metrics),
        *_generation(metrics),
        _over_reliance(metrics),
        *_memory_swap(metrics),
        _captions(metrics),
    ]


def _components(metrics: Mapping[str, Any]) -> list[Verdict]:
    """Tokenizer and retriever, on which the decoder depends."""
    ceiling = find(metrics, "tokenizer.scorer_ceiling.joint")
    same = find(metrics, "retriever.same_class_at_2")
    return [
        _verdict(
            "The tokenizer preserves the facts",
            None if ceiling is None else ceiling.value >= CEILING_BAR,
            f"After encoding and decoding, {percent(ceiling)} of test images still show the correct "
            "entity, place and color.",
            f"After encoding and decoding, only {percent(ceiling)} of test images still show the "
            "correct entity, place and color, which limits every decoder.",
        ),
        _verdict(
            "Retrieval finds the requested entity",
            None if same is None else same.value >= SAME_CLASS_BAR,
            f"{percent(same)} of the retrieved documents show the requested entity.",
            f"Only {percent(same)} of the retrieved documents show the requested entity; "
            "the decoder cannot copy what was not retrieved.",
        ),
    ]


def _copying(metrics: Mapping[str, Any]) -> list[Verdict]:
    nll0, nll1, nll2 = (find(metrics, f"decoder.art_nll.docs{k}") for k in range(3))
    return [
        _verdict(
            "The decoder uses a document",
            differs(metrics, "art_nll_docs1_minus_docs0", nll0, nll1),
            f"One document lowers the NLL per art code from {number(nll0)} to {number(nll1)}.",
            f"One document does not lower the NLL per art code ({number(nll0)} without, "
            f"{number(nll1)} with): the decoder does not copy yet.",
        ),
        _verdict(
            "Two documents are no worse than one",
            _not(differs(metrics, "art_nll_docs2_minus_docs1", nll2, nll1)),
            f"The NLL per art code is {number(nll1)} with one document, {number(nll2)} with two.",
            f"The NLL per art code rises from {number(nll1)} with one document to {number(nll2)} "
            "with two.",
        ),
    ]


def _generation(metrics: Mapping[str, Any]) -> list[Verdict]:

    def at(path: str) -> Figure | None:
        return find(metrics, path)

    ours, baseline = at("decoder.joint_accuracy.docs2"), at("control.joint_accuracy")
    ceiling, hit = (
        at("tokenizer.scorer_ceiling.joint"),
        at("baselines.hit_itself.joint_accuracy"),
    )
    random = at("baselines.random_documents.joint_accuracy")
    return [
        _verdict(
            "Retrieval helps",
            differs(metrics, "joint_docs2_minus_control", ours, baseline),
            f"Joint accuracy is {percent(ours)} with two documents and {percent(baseline)} for the "
            "baseline without retrieval.",
            f"Retrieval does not help yet: joint accuracy is {percent(ours)} with two documents and "
            f"{percent(baseline)} for the baseline without retrieval.",
        ),
        _verdict(
            "The content of the documents matters",
            differs(metrics, "joint_docs2_minus_random_documents", ours, random),
            f"With random documents joint accuracy is {percent(random)}.",
            f"Random documents do as well ({percent(random)}): the decoder does not use their "
            "content yet.",
        ),
        _verdict(
            "The decoder does better than returning the top hit",
            differs(metrics, "joint_docs2_minus_hit_itself", ours, hit),
            f"Returning the top hit unchanged reaches {percent(hit)}.",
            f"Returning the top hit unchanged reaches {percent(hit)}, which the decoder does not "
            "beat yet.",
        ),
        _verdict(
            "Joint accuracy reaches half of the ceiling",
            None
            if ours is None or ceiling is None
            else ours.value >= SHARE_OF_CEILING * ceiling.value,
            f"Joint accuracy is {percent(ours)}, the ceiling {percent(ceiling)}.",
            f"Joint accuracy is {percent(ours)}, less than half of the ceiling of "
            f"{percent(ceiling)}.",
        ),
    ]


def _over_reliance(metrics: Mapping[str, Any]) -> Verdict:
    """What images have from their documents against their captions."""
    copied = {name: find(metrics, f"decoder.{name}.docs2") for name in over_reliance.FIGURES}
    shares = (
        f"{percent(copied['copied_place'])} of the images have a document's place and "
        f"{percent(copied['copied_color'])} its background, where the caption asks for another; "
        f"{percent(copied['copied_whole'])} are a document's image"
    )
    within = [
        figure is not None and figure.value <= over_reliance.AT_MOST[name]
        for name, figure in copied.items()
    ]
    return _verdict(
        "Images follow the caption where documents differ",
        None if None in copied.values() else all(within),
        f"{shares}.",
        f"{shares}: the decoder relies on its documents too much.",
    )


def _memory_swap(metrics: Mapping[str, Any]) -> list[Verdict]:
    """Documents are removed from the memory and added, with the same weights."""
    ours, none = (find(metrics, f"decoder.joint_accuracy.{k}") for k in ("docs2", "docs0"))
    removed = find(metrics, "baselines.held_out_removed.joint_accuracy")
    kept = find(metrics, "decoder.paired.joint_held_out_removed_minus_docs0")
    seen = find(metrics, "decoder.seen.paired.joint_docs2_minus_held_out_removed")
    points = "not measured" if seen is None else f"{100 * seen.value:+.1f} points"
    without = (
        f"Without the held-out documents in the memory, joint accuracy is {percent(removed)}; "
        f"without any documents, it is {percent(none)}"
    )
    return [
        _verdict(
            "Removing an entity's documents removes the entity",
            None if kept is None else abs(kept.value) <= REMOVED_WITHIN,
            f"{without}.",
            f"{without}: documents of other entities change the result.",
        ),
        _verdict(
            "Adding documents adds entities without training",
            differs(metrics, "joint_docs2_minus_held_out_removed", ours, removed),
            f"With the same weights, joint accuracy rises from {percent(removed)} to "
            f"{percent(ours)} when the held-out documents are added.",
            f"With the same weights, joint accuracy goes from {percent(removed)} to "
            f"{percent(ours)} when the held-out documents are added, which is not a gain.",
        ),
        _verdict(
            "Seen entities are unaffected",
            None if seen is None else abs(seen.value) < SEEN_MOVES_BELOW,
            f"Adding the held-out documents changes joint accuracy on seen entities by {points}.",
            f"Adding the held-out documents changes joint accuracy on seen entities by {points}: "
            "the added documents interfere.",
        ),
    ]


def _captions(metrics: Mapping[str, Any]) -> Verdict:
    cider0, cider2 = (find(metrics, f"decoder.cider.{k}") for k in ("docs0", "docs2"))
    baseline = find(metrics, "control.cider")
    figures = (
        f"{number(cider2)} with two documents, {number(cider0)} without documents, "
        f"{number(baseline)} for the baseline"
    )
    return _verdict(
        "Retrieval improves captions",
        _both(
            differs(metrics, "cider_docs2_minus_docs0", cider2, cider0),
            differs(metrics, "cider_docs2_minus_control", cider2, baseline),
        ),
        f"CIDEr is {figures}.",
        f"CIDEr is {figures}: retrieval does not improve captions yet.",
    )


def headline(metrics: Mapping[str, Any]) -> Verdict:
    """The sentence under the title: does retrieval help on held-out entities?"""
    ours = find(metrics, "decoder.joint_accuracy.docs2")
    baseline = find(metrics, "control.joint_accuracy")
    return _verdict(
        "Retrieval helps",
        differs(metrics, "joint_docs2_minus_control", ours, baseline),
        f"On held-out entities, {percent(ours)} of the images generated with retrieval "
        f"have every fact right, compared with {percent(baseline)} without retrieval.",
        f"Retrieval does not help yet: on held-out entities, {percent(ours)} of the "
        f"images generated with retrieval have every fact right, compared with {percent(baseline)} "
        "without retrieval. This run checks the pipeline, not quality.",
    )


def _not(holds: bool | None) -> bool | None:
    return None if holds is None else not holds


def _both(one: bool | None, other: bool | None) -> bool | None:
    """False as soon as one is False, even if the other is unknown."""
    if one is None or other is None:
        return False if False in (one, other) else None
    return one and other


def _verdict(claim: str, holds: bool | None, if_true: str, if_false: str) -> Verdict:
    if holds is None:
        return Verdict(claim, "unknown", "Not measured, or measured without a confidence interval.")
    return Verdict(claim, "yes" if holds else "no", if_true if holds else if_false)
