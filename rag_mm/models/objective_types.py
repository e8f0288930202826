"""Types of the interface that all models share: `loss_fn(model, batch, rng) -> (loss, metrics)`."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Array, Float32, Shaped

Batch = Mapping[str, Shaped[Array | np.ndarray, "..."]]
"""Arrays of one batch by name; the first axis counts examples."""

Metrics = dict[str, tuple[Float32[Array, "..."], Float32[Array, ""]]]
"""Name -> (sum, weight): sums add up over batches and are divided by the total weight once."""
