"""From the word vectors of a language model to a frozen codebook (docs/papers/spae.md, "Language codebook").

Vectors are centered, mapped by fixed linear maps and scaled, once, before training. NumPy only.
"""

import numpy as np
from jaxtyping import Float, Float32

_HALF_STEP = 0.5 / 255  # of 8 bits
RMS = 0.25  # Root mean square of a table's entries: about that of pixels in 0..1.


def aligned(
    rows: Float[np.ndarray, "K V"], features: Float[np.ndarray, "K E"], ridge: float = 10.0
) -> Float[np.ndarray, "K E"]:
    """Word vectors mapped by ridge regression onto the words' features in a retriever, of length 1.

    The vectors of a small language model alone do not tell which words fit one picture: with them as the
    codebook, words of similar pictures lie anywhere. The image of a linear map of them does.

    Args:
        rows: word vectors.
        features: embeddings of the same words in the retriever; words without any, zeros, are mapped as
            the others but not fitted.
        ridge: penalty, for rows divided by their standard deviation.
    """
    centered = rows.astype(np.float64) - rows.mean(axis=0)
    inputs = np.c_[centered / max(centered.std(), 1e-12), np.ones(len(rows))]
    has_features = features.any(axis=1)
    known = inputs[has_features]
    gram = known.T @ known + ridge * np.eye(inputs.shape[1])
    mapped = inputs @ np.linalg.solve(gram, known.T @ features[has_features])
    return mapped / np.maximum(np.linalg.norm(mapped, axis=1, keepdims=True), 1e-12)


def principal(
    rows: Float[np.ndarray, "K V"], dim: int, is_whitened: bool, is_unit: bool
) -> Float32[np.ndarray, "K {dim}"]:
    """The first principal components of word vectors, centered, as a codebook whose entries have RMS `RMS`.

    Args:
        rows: word vectors, V >= dim and K > dim.
        dim: width of the codebook.
        is_whitened: every component gets the same variance.
        is_unit: every row gets the same length.

    Raises:
        ValueError: the vectors span fewer than `dim` directions, or are not finite.
    """
    if not np.isfinite(rows).all():
        raise ValueError("a word vector is not finite")
    centered = rows.astype(np.float64) - rows.mean(axis=0)
    spreads, directions = _components(centered)
    rank = int((spreads > spreads[0] * 1e-6).sum()) if spreads.size else 0
    if rank < dim:
        raise ValueError(f"the word vectors span {rank} directions, fewer than {dim}")
    table = centered @ directions[:, :dim]
    if is_whitened:
        table = table / table.std(axis=0)
    if is_unit:
        table = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    return (table / np.sqrt((table**2).mean()) * RMS).astype(np.float32)


def matched_shortcuts(
    patches: Float[np.ndarray, "P C"], table: Float32[np.ndarray, "K D"]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Linear maps from patches to codes and back, component by component, at the table's spread.

    Principal component i of the patches becomes component i of the latents, with the standard deviation of
    the table's component i, so that training starts with most words in use; an encoder that starts near zero
    uses few words, and stays there. Components beyond the smaller of C and D are zero, and so are those that
    vary by less than half a step of 8 bits, which would be amplified noise.

    Args:
        patches: pixels of patches of training images, in 0..1.
        table: the codebook.

    Returns:
        `kernel` [C, D] and `bias` [D] of the encoder's shortcut, and of the decoder's, [D, C] and [C].
    """
    mean = patches.mean(axis=0)
    spreads, directions = _components(patches - mean)
    deviations = spreads / np.sqrt(len(patches))
    count = min(table.shape[1], len(spreads), int((deviations > _HALF_STEP).sum()))
    basis, deviations = directions[:, :count], deviations[:count]
    gains = table.std(axis=0)[:count] / deviations
    into, back = (np.zeros((patches.shape[1], table.shape[1])) for _ in range(2))
    into[:, :count], back[:, :count] = basis * gains, basis / gains
    single = lambda kernel, bias: {
        "kernel": kernel.astype(np.float32),
        "bias": bias.astype(np.float32),
    }
    return single(into, -mean @ into), single(back.T, mean)


def least_squares_guide(
    embeddings: Float[np.ndarray, "R E"], latents: Float[np.ndarray, "R D"], ridge: float = 1.0
) -> dict[str, np.ndarray]:
    """`kernel` [E, D] and `bias` [D] that map embeddings of images to wanted latents."""
    inputs = np.c_[embeddings.astype(np.float64), np.ones(len(embeddings))]
    gram = inputs.T @ inputs + ridge * np.eye(inputs.shape[1])
    solved = np.linalg.solve(gram, inputs.T @ latents).astype(np.float32)
    return {"kernel": solved[:-1], "bias": solved[-1]}


def _components(
    centered: Float[np.ndarray, "K V"],
) -> tuple[Float[np.ndarray, " R"], Float[np.ndarray, "V R"]]:
    """Singular values, falling, and the principal directions of centered rows; R = min(K, V).

    Many rows are decomposed by their V x V products, of which no spread below 1e-8 of the largest can be told
    from rounding.
    """
    if len(centered) <= centered.shape[1]:
        _, spreads, directions = np.linalg.svd(centered, full_matrices=False)
        return spreads, directions.T
    rows = centered.astype(np.float64)
    squares, directions = np.linalg.eigh(rows.T @ rows)
    return np.sqrt(np.maximum(squares, 0))[::-1], directions[:, ::-1]
