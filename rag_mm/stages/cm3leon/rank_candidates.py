"""Re-ranking: of several candidates the image that the retriever finds closest to the caption is kept."""

from collections.abc import Mapping, Sequence

import numpy as np

from rag_mm.stages.cm3leon import decoding_settings
from rag_mm.stages.cm3leon.decoding_settings import DecodingStageConfig

MIXTURE = "mixture"


def rank(
    config: DecodingStageConfig, values: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    """Joint accuracy after re-ranking, and its upper bound.

    All candidates are divided into groups of n, and figures are means over the groups, so that a small n is
    measured on as many images as a large one. The mixture takes its candidates from both makers by turns.

    Args:
        config: of the stage.
        values: `joint` and `similarity` of every candidate, one value per scene.

    Returns:
        {"ranked_MAKER_nN": {"joint", "upper_bound"}}, each [Q] in [0, 1]: the image that the retriever keeps
        is right; any of the candidates is, which is what the exact scorer would keep.
    """
    named = {
        maker: [setting.name for setting in drawn]
        for maker, drawn in decoding_settings.candidates(config).items()
    }
    # By turns, as `generate` makes them: no two candidates of a group have the same seed.
    even, odd = list(named.values()), list(named.values())[::-1]
    turns = [
        pair[number % 2]
        for order in (even, odd)
        for number, pair in enumerate(zip(*order, strict=True))
    ]
    return {
        ranked_name(maker, count): _grouped(values, names, count)
        for maker, names in (named | {MIXTURE: turns}).items()
        for count in config.num_candidates
    }


def ranked_name(maker: str, count: int) -> str:
    """Name of a figure in metrics: `plain`, `contrast` or `mixture`, and the number of candidates."""
    return f"ranked_{maker}_n{count}"


def kept(similarities: np.ndarray) -> np.ndarray:
    """The candidate that the retriever keeps for each scene, int64 [Q], from its cosines [n, Q]."""
    return similarities.argmax(axis=0)


def _grouped(
    values: Mapping[str, Mapping[str, np.ndarray]], names: Sequence[str], count: int
) -> dict[str, np.ndarray]:
    joint, similarity = (
        np.stack([values[name][figure] for name in names]).reshape(
            -1, count, len(values[names[0]][figure])
        )
        for figure in ("joint", "similarity")
    )
    chosen = [
        right[kept(each), np.arange(right.shape[1])]
        for right, each in zip(joint, similarity, strict=True)
    ]
    return {"joint": np.mean(chosen, axis=0), "upper_bound": joint.max(axis=1).mean(axis=0)}
