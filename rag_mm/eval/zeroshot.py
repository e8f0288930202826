"""Zero-shot classification, retrieval and entity recognition by cosine similarity (RECO, section 8)."""

from collections.abc import Sequence

import numpy as np

from rag_mm.core.errors import UserError

# A few of CLIP's, for photographs.
TEMPLATES = (
    "a photo of a {}.",
    "a good photo of a {}.",
    "a close-up photo of a {}.",
    "a picture of the {}.",
)
NAME_ONLY = ("{}",)
RECALL_AT = (1, 5, 10)


def prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template filled with every name, all of one name together.

    Raises:
        UserError: no name, no template, or a template without `{}`.
    """
    if not class_names or not templates:
        raise UserError("Zero-shot classification needs a class and a template at least.")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"The template {template!r} has no {{}} for the name of the class.")
    return [template.replace("{}", name) for name in class_names for template in templates]


def ensemble(embeddings: np.ndarray) -> np.ndarray:
    """The mean over templates, rescaled to length 1: float32 [C, P, D] -> [C, D]."""
    mean = embeddings.mean(axis=1)
    return (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)


def hits_at_1(images: np.ndarray, classes: np.ndarray, class_ids: np.ndarray) -> np.ndarray:
    """Whether each image is nearest to its own class, and to no other as near: bool [Q].

    Args:
        images: float32 [Q, D] unit rows.
        classes: float32 [C, D] unit rows.
        class_ids: int [Q], of which class each is.
    """
    return ranks(images @ classes.T, class_ids) == 0


def ranks(similarities: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """How many others are as near as what is wanted, or nearer: int64 [Q].

    Args:
        similarities: [Q, N].
        wanted: int [Q], or bool [Q, N] where several answers are right and the best one counts.
    """
    if wanted.ndim == 1:
        wanted = np.arange(similarities.shape[1])[None] == wanted[:, None]
    best = np.where(wanted, similarities, -np.inf).max(axis=1, keepdims=True)
    # Ties are no hits: a collapsed model finds everything alike.
    return ((similarities >= best) & ~wanted).sum(axis=1)


def recall_at_k(
    similarities: np.ndarray, wanted: np.ndarray, at: Sequence[int] = RECALL_AT
) -> dict[int, np.ndarray]:
    """For each k whether what is wanted is among the k nearest, bool [Q]; arguments as `ranks`."""
    place = ranks(similarities, wanted)
    return {k: place < k for k in at}


def harmonic_mean(seen: float, unseen: float) -> float:
    """2 / (1 / seen + 1 / unseen), OVEN's main score; 0 where either is 0."""
    return 0.0 if min(seen, unseen) <= 0 else 2 * seen * unseen / (seen + unseen)
