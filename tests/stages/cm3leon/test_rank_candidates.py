"""Re-ranking by hand: groups of candidates, what the retriever keeps, and the upper bound."""

import numpy as np
import pytest

from rag_mm.stages.cm3leon import decoding_settings, rank_candidates
from rag_mm.stages.cm3leon.decoding_settings import DecodingStageConfig
from rag_mm.stages.shared.world_config import EmojiWorld

CONFIG = DecodingStageConfig(seed=0, world=EmojiWorld(), num_candidates=(1, 2, 4))


def values(joint, similarity, other=0.0):
    """Two scenes; the candidates of contrast are all alike."""
    plain, contrast = decoding_settings.candidates(CONFIG).values()
    made = {
        setting.name: {"joint": np.array(j, float), "similarity": np.array(s, float)}
        for setting, j, s in zip(plain, joint, similarity, strict=True)
    }
    alike = {"joint": np.full(2, other), "similarity": np.full(2, 0.5)}
    return made | {setting.name: alike for setting in contrast}


def test_the_most_similar_of_each_group_is_kept():
    joint = [(1, 0), (0, 1), (0, 0), (0, 1)]
    similarity = [(0.9, 0.9), (0.1, 0.1), (0.2, 0.2), (0.1, 0.3)]
    found = rank_candidates.rank(CONFIG, values(joint, similarity))
    assert found["ranked_plain_n1"]["joint"].tolist() == [0.25, 0.5]
    # Groups (0, 1) and (2, 3): the first keeps candidate 0; the second keeps 2, and 3 for scene 1.
    assert found["ranked_plain_n2"]["joint"].tolist() == [0.5, 0.5]
    assert found["ranked_plain_n2"]["upper_bound"].tolist() == [0.5, 1.0]
    assert found["ranked_plain_n4"]["joint"].tolist() == [1.0, 0.0]
    assert found["ranked_plain_n4"]["upper_bound"].tolist() == [1.0, 1.0]


def test_the_mixture_has_half_of_each_and_no_seed_twice_in_a_group():
    """Of four, candidates 0 and 2 are plain, 1 and 3 contrast; a second group swaps them."""
    similarity = [(0.9, 0.1)] * 4
    found = rank_candidates.rank(CONFIG, values([(1, 1)] * 4, similarity))["ranked_mixture_n4"]
    assert found["joint"].tolist() == [1.0, 0.0]
    only_first = [(1, 1), (0, 0), (0, 0), (0, 0)]
    found = rank_candidates.rank(CONFIG, values(only_first, similarity))["ranked_mixture_n4"]
    assert found["upper_bound"].mean() == pytest.approx(0.5)
