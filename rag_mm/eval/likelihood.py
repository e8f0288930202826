"""Likelihood of given images under a model: NLL per image code, conditioned on retrieved documents."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rag_mm.core import batches, sharding
from rag_mm.data import sequences, token_documents
from rag_mm.decode.tasks import Generator
from rag_mm.nn.param_trees import Params
from rag_mm.ops import losses


class CodeScores(NamedTuple):
    """Per code of B images: NLL in nats, float32 [B, N]; whether it was the argmax, bool [B, N]."""

    nll: np.ndarray
    is_top1: np.ndarray


def score_codes(
    generator: Generator,
    mains: Sequence[token_documents.Example],
    docs: Sequence[Sequence[token_documents.Example]],
    batch_size: int = 64,
) -> CodeScores:
    """Scores every code of the main documents' images, given their captions and retrieved documents.

    Args:
        generator: the model; its softmax is over the whole vocabulary.
        mains: the documents to score.
        docs: for each, the documents that precede it.
        batch_size: sequences per batch; see `batches.split`. Batches are multiples of the data shards of the
            current mesh.
    """
    layout = generator.layout
    # No spans are masked here, so the space for moved spans is cut off.
    max_docs = max((len(preceding) for preceding in docs), default=0)
    length = dataclasses.replace(layout, max_docs=max_docs).unmasked_length
    pairs = list(zip(mains, docs, strict=True))
    num_codes = len(mains[0].codes)
    found = []
    for part in batches.split(len(pairs), batch_size, multiple=sharding.batch_parts()):
        plain = [sequences.lay_out(layout, generator.vocabulary, *pairs[i]) for i in part]
        rows = [sequences.as_row(generator.vocabulary, tokens, length) for tokens in plain]
        images = [pairs[i][0].find(token_documents.IMAGE) for i in part]
        code_starts = [int(t.main[image, 0]) for t, image in zip(plain, images, strict=True)]
        batch = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
        scores = _score(generator.params, batch, graphdef=generator.graphdef)
        # The target of token t is token t + 1.
        at = np.array(code_starts)[:, None] - 1 + np.arange(num_codes)
        found.append([np.take_along_axis(np.asarray(s), at, axis=1) for s in scores])
    return CodeScores(*(np.concatenate(s)[: len(pairs)] for s in zip(*found, strict=True)))


@partial(jax.jit, static_argnames="graphdef")
def _score(
    params: Params, batch: dict[str, jax.Array], *, graphdef: nnx.GraphDef
) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, params)
    hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    logits = model.logits(hidden)
    is_top1 = jnp.argmax(logits, axis=-1) == batch["targets"]
    nll = losses.token_nll(logits, batch["targets"])
    # Replicated: every process reads all sequences.
    return sharding.place(nll, None, None), sharding.place(is_top1, None, None)
