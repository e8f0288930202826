"""Agreement of edits by embeddings: staying is fidelity without compliance, and the reverse."""

import numpy as np

from rag_mm.eval import edit_agreement

SOURCE, TARGET, OTHER = np.eye(3)


def agree(edited):
    found = edit_agreement.agreement(edited[None], SOURCE[None], TARGET[None])
    return {name: round(float(values[0]), 3) for name, values in found.items()}


def test_by_hand():
    assert agree(TARGET) == {"compliance": 1.0, "fidelity": 0.0, "joint": 0.0}
    assert agree(SOURCE) == {"compliance": 0.0, "fidelity": 1.0, "joint": 0.0}
    between = (SOURCE + TARGET) / np.sqrt(2)
    # (between - source) . (target - source) = 1.0; norms .765 and 1.414.
    assert agree(between) == {"compliance": 0.924, "fidelity": 0.707, "joint": 0.653}
    assert agree(OTHER) == {"compliance": 0.5, "fidelity": 0.0, "joint": 0.0}
    assert agree(-TARGET) == {"compliance": 0.0, "fidelity": 0.0, "joint": 0.0}
