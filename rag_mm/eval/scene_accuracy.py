"""Accuracy of generated scenes: entity, place and color, and the NLL of their codes.

The headline metric is *joint* accuracy, all three facts correct at once. Returning the top hit unchanged does
not score on it, nor does a model without retrieval on held-out entities (docs/papers/ra_cm3.md).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rag_mm.eval import statistics
from rag_mm.worlds.emoji import scene_facts
from rag_mm.worlds.emoji.emoji_scenes import Facts, Level

FACTS = ("entity", "place", "color", "joint")


def outcomes(read: Sequence[Facts], asked: Sequence[Facts], level: Level) -> dict[str, np.ndarray]:
    """Which facts of each image are correct, per document, as paired differences need them.

    Args:
        read: facts that the scorer read from B images.
        asked: facts of their prompts, in the same order.
        level: level of the scenes.

    Returns:
        {"entity", "place", "color", "joint"}, each bool [B].

    Raises:
        ValueError: the two lists differ in length.
    """
    if len(read) != len(asked):
        raise ValueError(f"facts of {len(read)} images for {len(asked)} captions")
    results = [scene_facts.compare(*pair, level) for pair in zip(read, asked, strict=True)]
    return {fact: np.array([result[fact] for result in results], bool) for fact in FACTS}


def accuracies(right: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | int]]:
    """Accuracy of each fact from `outcomes`.

    Returns:
        {"entity_accuracy", "place_accuracy", "color_accuracy", "joint_accuracy"}, each
        {"accuracy", "ci95", "n"}.

    Raises:
        UserError: there is no image.
    """
    return {
        f"{fact}_accuracy": statistics.accuracy(right[fact], f"{fact} accuracy") for fact in FACTS
    }


def per_document(figures: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Mean of a per-code metric for each document, over all its codes or those under `mask`.

    Args:
        figures: float or bool [B, N], one value per image code, such as its NLL.
        mask: bool [B, N], for instance the codes that show art; None means all.

    Returns:
        float64 [B]. Every document has the same weight however many codes it counts, so means of these
        values agree with means of their paired differences.

    Raises:
        ValueError: shapes differ, or a document has no code under its mask.
    """
    figures = np.asarray(figures, np.float64)
    mask = np.ones(figures.shape, bool) if mask is None else np.asarray(mask, bool)
    if figures.ndim != 2 or figures.shape != mask.shape:
        raise ValueError(f"figures {figures.shape} and mask {mask.shape} must both be [B, N]")
    counts = mask.sum(axis=1)
    if not counts.all():
        raise ValueError(f"document {int(np.argmin(counts))} has no code under its mask")
    return np.where(mask, figures, 0.0).sum(axis=1) / counts


def nll_summary(nll: np.ndarray, art: np.ndarray) -> dict[str, dict[str, float | int]]:
    """NLL per code and per art code.

    Args:
        nll: float [B, N], nats; B >= 2.
        art: bool [B, N], the codes that show an entity.

    Returns:
        {"image_nll", "art_nll"}, each {"mean", "ci95", "n"} over documents, nats per code.

    Raises:
        UserError: fewer than two documents, or NaN among the values.
        ValueError: as `per_document`.
    """
    return {
        "image_nll": statistics.mean(per_document(nll), "image NLL"),
        "art_nll": statistics.mean(per_document(nll, art), "art NLL"),
    }
