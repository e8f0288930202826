"""How an edited picture agrees with what was asked, by embeddings, where no exact facts are known.

As in InstructPix2Pix (Brooks et al. 2023, section 4.2) with CLIP, one figure is how similar the picture stays
to the one that was edited, the other whether it changes in the right direction, here that of the published
target.
"""

import numpy as np


def agreement(edited: np.ndarray, source: np.ndarray, target: np.ndarray) -> dict[str, np.ndarray]:
    """Agreement of edited pictures with what was given and wanted.

    Args:
        edited, source, target: unit vectors float [B, D] of what the model drew, of what it was given and
            of what is wanted.

    Returns:
        Float64 [B] each, at most 1: `fidelity`, the cosine of edited and source; `compliance`, the cosine of
        the changes edited - source and target - source, 0 where either changes nothing; `joint`, their
        product, where a negative one counts as 0.
    """
    edited, source, target = (np.asarray(each, np.float64) for each in (edited, source, target))
    fidelity = (edited * source).sum(axis=1)
    done, asked = edited - source, target - source
    size = np.linalg.norm(done, axis=1) * np.linalg.norm(asked, axis=1)
    compliance = np.where(size > 1e-9, (done * asked).sum(axis=1) / np.maximum(size, 1e-9), 0.0)
    joint = np.maximum(compliance, 0) * np.maximum(fidelity, 0)
    return {"compliance": compliance, "fidelity": fidelity, "joint": joint}
