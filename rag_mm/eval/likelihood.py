"""How likely a model finds given pictures: NLL per image code, documents given (RA-CM3, spec section 12)."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rag_mm.core import sharding
from rag_mm.data import sequences
from rag_mm.decode.tasks import Generator
from rag_mm.nn.param_trees import Params
from rag_mm.ops import losses


class CodeScores(NamedTuple):
    """Of every code of B pictures: NLL in nats, float32 [B, N], and whether it was likeliest, bool [B, N]."""

    nll: np.ndarray
    is_top1: np.ndarray


def score_codes(
    generator: Generator,
    mains: Sequence[sequences.Example],
    docs: Sequence[Sequence[sequences.Example]],
    batch_size: int = 64,
) -> CodeScores:
    """How well every code of the main pictures is foreseen, given their texts and documents.

    Args:
        generator: the model; the whole vocabulary is the alternative.
        mains: the documents to score.
        docs: for each the documents before it.
        batch_size: rows at once, or more where they are to split over a mesh in context; the last batch is
            padded.
    """
    batch_size += -batch_size % sharding.batch_parts()
    layout = generator.layout
    # Nothing is masked here, so the room for moved spans is cut off.
    most = max((len(given) for given in docs), default=0)
    length = dataclasses.replace(layout, max_docs=most).moved_start
    found = []
    for first in range(0, len(mains), batch_size):
        part = slice(first, first + batch_size)
        made = [
            sequences.make_row(layout, generator.vocabulary, main, given)
            for main, given in zip(mains[part], docs[part], strict=True)
        ]
        ends = [
            int(sequences.find_segments(layout, main, given)[-1, 0])
            for main, given in zip(mains[part], docs[part], strict=True)
        ]
        missing = batch_size - len(made)
        batch = {k: np.stack([row[k] for row in made + made[-1:] * missing]) for k in made[0]}
        batch = {k: v[:, :length] for k, v in batch.items()}
        scores = _score(generator.params, batch, graphdef=generator.graphdef)
        # The target of token t is token t + 1.
        at = np.array(ends)[:, None] - 1 + np.arange(layout.num_codes)
        found.append([np.take_along_axis(np.asarray(s)[: len(made)], at, axis=1) for s in scores])
    return CodeScores(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


@partial(jax.jit, static_argnames="graphdef")
def _score(
    params: Params, batch: dict[str, jax.Array], *, graphdef: nnx.GraphDef
) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, params)
    hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    logits = model.logits(hidden)
    is_top1 = jnp.argmax(logits, axis=-1) == batch["targets"]
    nll = losses.token_nll(logits, batch["targets"])
    # Whole on every device: each of several processes reads all rows.
    return sharding.place(nll, None, None), sharding.place(is_top1, None, None)
