"""Figures of images' codes, encoded or predicted: variance explained, nearest images, collapse, readout."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

_RIDGE = 10.0  # Added to the diagonal of the normal equations, for standardised codes.


def variance(codes: Float[np.ndarray, "B ..."]) -> float:
    """Variance between images, a mean over all dimensions."""
    return float(np.asarray(codes, np.float64).var(0).mean())


def participation_ratio(codes: Float[np.ndarray, "B ..."]) -> float:
    """(sum of eigenvalues)^2 / sum of squared eigenvalues of the covariance: about the number of directions.

    At most B - 1. One that is far below the number of dimensions shows a collapse that no variance shows.
    """
    values = np.asarray(codes, np.float64).reshape(len(codes), -1)
    centred = values - values.mean(0)
    gram = centred @ centred.T if len(values) < values.shape[1] else centred.T @ centred
    return float(np.trace(gram) ** 2 / max(np.square(gram).sum(), 1e-30))


def explained(
    predicted: Float[np.ndarray, "B ..."], codes: Float[np.ndarray, "B ..."], between: float
) -> Float[np.ndarray, " B"]:
    """1 - squared error / `between`, the variance between images, of each image; their mean is R^2."""
    errors = np.square(np.asarray(predicted, np.float64) - codes).reshape(len(codes), -1)
    return 1 - errors.mean(1) / max(between, 1e-12)


def is_nearest(
    predicted: Float[np.ndarray, "B ..."],
    codes: Float[np.ndarray, "P ..."],
    candidates: Int[np.ndarray, "B C"],
) -> Bool[np.ndarray, " B"]:
    """Whether the first candidate of each prediction is the nearest of its C, places in `codes`."""
    return nearest(predicted, codes, candidates)[:, 0] == candidates[:, 0]


def nearest(
    predicted: Float[np.ndarray, "B ..."],
    codes: Float[np.ndarray, "P ..."],
    candidates: Int[np.ndarray, "B C"],
) -> Int[np.ndarray, "B C"]:
    """The candidates of each prediction, the nearest first."""
    flat = codes.reshape(len(codes), -1)
    ordered = []
    for own, places in zip(predicted.reshape(len(predicted), -1), candidates, strict=True):
        distances = np.square(flat[places] - own).sum(1)
        ordered.append(places[np.argsort(distances, kind="stable")])
    return np.stack(ordered)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearReadout:
    """A linear map from codes to pixels: what a code holds, read in the plainest way.

    Attributes:
        mean, std: float [D] of the codes that it was fitted to.
        weights: float [D + 1, P], the last row the bias.
    """

    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray

    @classmethod
    def fit(
        cls, codes: Float[np.ndarray, "B ..."], images: Int[np.ndarray, "B H W 3"]
    ) -> "LinearReadout":
        """Ridge regression on standardised codes."""
        flat = np.asarray(codes, np.float64).reshape(len(codes), -1)
        mean, std = flat.mean(0), flat.std(0) + 1e-3
        inputs = _with_one((flat - mean) / std)
        gram = inputs.T @ inputs + _RIDGE * np.eye(inputs.shape[1])
        pixels = images.reshape(len(images), -1).astype(np.float64) / 255
        return cls(mean, std, np.linalg.solve(gram, inputs.T @ pixels))

    def images(
        self, codes: Float[np.ndarray, "B ..."], shape: tuple[int, int, int]
    ) -> Int[np.ndarray, "B H W 3"]:
        """Images uint8 of codes."""
        flat = np.asarray(codes, np.float64).reshape(len(codes), -1)
        pixels = _with_one((flat - self.mean) / self.std) @ self.weights
        return (255 * np.clip(pixels, 0, 1)).round().astype(np.uint8).reshape(-1, *shape)


def _with_one(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, np.ones((len(values), 1))], axis=1)
