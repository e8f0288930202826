"""Zero-shot classification, retrieval and entity recognition by cosine similarity (docs/papers/reco.md)."""

from collections.abc import Sequence

import numpy as np

from rag_mm.core.errors import UserError

# Four of CLIP's prompt templates for photographs.
TEMPLATES = (
    "a photo of a {}.",
    "a good photo of a {}.",
    "a close-up photo of a {}.",
    "a picture of the {}.",
)
NAME_ONLY = ("{}",)
RECALL_AT = (1, 5, 10)


def prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template filled with every class name, grouped by class.

    Raises:
        UserError: no class name, no template, or a template without `{}`.
    """
    if not class_names or not templates:
        raise UserError("Zero-shot classification needs at least one class and one template.")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"The template {template!r} has no {{}} for the class name.")
    return [template.replace("{}", name) for name in class_names for template in templates]


def ensemble(embeddings: np.ndarray) -> np.ndarray:
    """Mean over P templates, normalized to unit length: float32 [C, P, D] -> [C, D]."""
    mean = embeddings.mean(axis=1)
    return (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)


def hits_at_1(images: np.ndarray, classes: np.ndarray, class_ids: np.ndarray) -> np.ndarray:
    """Whether each image is strictly closest to its own class: bool [Q].

    Args:
        images: float32 [Q, D], unit vectors.
        classes: float32 [C, D], unit vectors.
        class_ids: int [Q], the class of each image.
    """
    return ranks(images @ classes.T, class_ids) == 0


def ranks(similarities: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Number of wrong candidates that score at least as high as the best correct one: int64 [Q].

    Args:
        similarities: [Q, N].
        wanted: int [Q], the correct candidate, or bool [Q, N] if several are correct.
    """
    if wanted.ndim == 1:
        wanted = np.arange(similarities.shape[1])[None] == wanted[:, None]
    best = np.where(wanted, similarities, -np.inf).max(axis=1, keepdims=True)
    # A tie is not a hit: to a collapsed model all candidates look alike.
    return ((similarities >= best) & ~wanted).sum(axis=1)


def recall_at_k(
    similarities: np.ndarray, wanted: np.ndarray, at: Sequence[int] = RECALL_AT
) -> dict[int, np.ndarray]:
    """For each k, whether a correct candidate is among the top k, bool [Q]; arguments as in `ranks`."""
    rank = ranks(similarities, wanted)
    return {k: rank < k for k in at}


def harmonic_mean(seen: float, unseen: float) -> float:
    """2 / (1 / seen + 1 / unseen), OVEN's main score; 0 if either is 0."""
    return 0.0 if min(seen, unseen) <= 0 else 2 * seen * unseen / (seen + unseen)
