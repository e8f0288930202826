"""How likely a model finds given pictures: NLL per image code, documents given (RA-CM3, spec section 12)."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx

from rag_mm.data import rows
from rag_mm.decode.modes import Generator
from rag_mm.nn.params import Params
from rag_mm.ops import losses


def code_nll(
    generator: Generator,
    mains: Sequence[rows.Example],
    docs: Sequence[Sequence[rows.Example]],
    batch_size: int = 64,
) -> np.ndarray:
    """NLL of every code of the main pictures, given their texts and documents.

    Args:
        generator: the model.
        mains: the documents to score.
        docs: for each the documents before it.
        batch_size: rows at once; the last batch is padded.

    Returns:
        float32 [B, num_codes], nats, the whole vocabulary being the alternative.
    """
    layout = generator.layout
    # Nothing is masked here, so the room for moved spans is cut off.
    length = layout.moved_start
    found = []
    for first in range(0, len(mains), batch_size):
        part = slice(first, first + batch_size)
        made = [
            rows.make_row(layout, generator.vocabulary, main, given)
            for main, given in zip(mains[part], docs[part], strict=True)
        ]
        ends = [
            int(rows.find_segments(layout, main, given)[-1, 0])
            for main, given in zip(mains[part], docs[part], strict=True)
        ]
        missing = batch_size - len(made)
        batch = {k: np.stack([row[k] for row in made + made[-1:] * missing]) for k in made[0]}
        batch = {k: v[:, :length] for k, v in batch.items()}
        nll = np.asarray(_token_nll(generator.params, batch, graphdef=generator.graphdef))
        # The target of token t is token t + 1.
        found += [nll[i, end - 1 : end - 1 + layout.num_codes] for i, end in enumerate(ends)]
    return np.stack(found)


@partial(jax.jit, static_argnames="graphdef")
def _token_nll(params: Params, batch: dict[str, jax.Array], *, graphdef: nnx.GraphDef) -> jax.Array:
    model = nnx.merge(graphdef, params)
    hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    return losses.token_nll(model.logits(hidden), batch["targets"])
