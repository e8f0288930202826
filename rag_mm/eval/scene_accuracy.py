"""What a scene got right: entity, place, colour, and the NLL of its codes (design section 8).

The headline is *joint* accuracy, all three facts at once: returning the retrieved picture itself
cannot reach it, nor can a model without memory on held-out entities (RA-CM3 section 12).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rag_mm.eval import statistics
from rag_mm.worlds.emoji import scene_facts
from rag_mm.worlds.emoji.emoji_scenes import Facts, Level

FACTS = ("entity", "place", "color", "joint")


def outcomes(read: Sequence[Facts], asked: Sequence[Facts], level: Level) -> dict[str, np.ndarray]:
    """Which facts of each picture are right, document by document (what pairing needs).

    Args:
        read: the facts a scorer read from B pictures.
        asked: the facts their captions asked for, in the same order.
        level: the level the scenes belong to.

    Returns:
        {"entity", "place", "color", "joint"}, each bool [B].

    Raises:
        ValueError: the two lists differ in length.
    """
    if len(read) != len(asked):
        raise ValueError(f"facts of {len(read)} pictures for {len(asked)} captions")
    rows = [scene_facts.compare(got, want, level) for got, want in zip(read, asked, strict=True)]
    return {fact: np.array([row[fact] for row in rows], bool) for fact in FACTS}


def accuracies(right: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | int]]:
    """Accuracy of each fact from `outcomes`.

    Returns:
        {"entity_accuracy", "place_accuracy", "color_accuracy", "joint_accuracy"}, each
        {"accuracy", "ci95", "n"}.

    Raises:
        UserError: there is no picture.
    """
    return {
        f"{fact}_accuracy": statistics.accuracy(right[fact], f"{fact} accuracy") for fact in FACTS
    }


def per_document(figures: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Mean of a figure of every code, for each document, over all its codes or those under `mask`.

    Args:
        figures: float or bool [B, N], one for each image code, such as its NLL.
        mask: bool [B, N], for instance the codes that show art; None means all.

    Returns:
        float64 [B]. Every document weighs the same however many codes it counts, so that the mean
        of these is what paired differences of them add up to.

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
        UserError: fewer than two documents, or NaN among their figures.
        ValueError: as `per_document`.
    """
    return {
        "image_nll": statistics.mean(per_document(nll), "image NLL"),
        "art_nll": statistics.mean(per_document(nll, art), "art NLL"),
    }
