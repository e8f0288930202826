"""Corpora of one-colored images, coded by an image tokenizer that needs no training, and chains over them."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from rag_mm.core.document_types import Document, Image, Text
from rag_mm.corpus import corpus_reader, neighbor_rows, search_neighbors, write_corpus
from rag_mm.data import vocabulary
from rag_mm.memory import retrieval_memory
from rag_mm.memory.writing import writer
from rag_mm.models.spae import objective
from rag_mm.models.spae.autoencoder import SPAE
from rag_mm.models.spae.spae_config import SPAEConfig
from rag_mm.stages.shared import frozen

sys.path.append(str(pathlib.Path(__file__).parents[2] / "corpus"))
from corpus_cases import Items
from stand_in import StandInEncoder

COLORS = ("red", "green", "blue", "white", "black", "pink")
MODEL = SPAEConfig(
    image_size=16,
    patch_size=4,
    encoder="patch",
    width=8,
    width_multipliers=(1,),
    num_res_blocks=0,
    embed_dim=8,
    codebook_size=32,
    levels=(4,),
)
SHAPE = dict(num_layers=1, embed_dim=32, num_heads=2, mlp_dim=64)


def documents(count: int, start: int = 0) -> list[Document]:
    """Images of a color, which the caption names, with a little noise."""
    made = []
    for i in range(start, start + count):
        rng = np.random.default_rng(i)
        color = np.random.default_rng(1000 + i % len(COLORS)).integers(0, 256, 3)
        pixels = np.clip(color + rng.integers(-9, 10, (16, 16, 3)), 0, 255).astype(np.uint8)
        text = f"{COLORS[i % len(COLORS)]} number {i}"
        made.append(Document(f"doc-{i}", (Text(text), Image(pixels))))
    return made


def tokenizer(folder: pathlib.Path, seed: int = 0) -> frozen.FrozenTokenizer:
    """An image tokenizer with random parameters and a codebook of the vectors of its patches."""
    if not folder.exists():
        words = vocabulary.train_vocabulary([" ".join(COLORS), "number"] * 2, 280, 32, 4)
        model = SPAE(MODEL, rngs=nnx.Rngs(params=seed))
        images = np.stack([document.image for document in documents(64, 500)])
        codebook = objective.init_codebook(model, jnp.asarray(images), jax.random.key(seed))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param)) | {"codebook": codebook}
        frozen.save_tokenizer(epath.Path(folder), MODEL, words, params)
    return frozen.FrozenTokenizer(folder)


def corpus(
    folder: pathlib.Path, given: list[Document], model: frozen.FrozenTokenizer, **options
) -> corpus_reader.TokenCorpus:
    """A corpus of shards of 16 documents."""
    options = {"shard_size": 16, **options}
    write_corpus.build(
        folder,
        {"source": Items(given)},
        model,
        pathlib.Path(model.folder),
        write_corpus.BuildOptions(**options),
    )
    return corpus_reader.TokenCorpus(folder)


def with_neighbors(
    found: corpus_reader.TokenCorpus, given: list[Document], memory_folder: pathlib.Path, **options
) -> neighbor_rows.NeighborRows:
    """Searches a memory of the documents themselves."""
    memory = retrieval_memory.Memory.build(
        memory_folder, given, StandInEncoder(), options=writer.Options(index="exact")
    )
    model = frozen.FrozenTokenizer(found.path / "tokenizer")
    settings = search_neighbors.SearchOptions(**options)
    folder = search_neighbors.search(found, memory, [Items(given)], model, settings)
    return neighbor_rows.NeighborRows(folder, found)


def page(corpus_folder: pathlib.Path, **pretraining) -> dict:
    """A chain that takes the tokenizer of a corpus and trains a tiny decoder for a few steps."""
    given = dict(model={}, optimizer={}, loop=dict(num_steps=1))
    settings = dict(
        model=SHAPE,
        optimizer=dict(learning_rate=1e-2, warmup_steps=2),
        loop=dict(num_steps=4, log_every=2, checkpoint_every=2),
        sequences=dict(max_seq_len=128, max_text_len=8, window=32),
        batch_size=4,
        num_held_out=6,
        num_watched=3,
    )
    return dict(
        stages=("tokenizer", "pretraining"),
        seed=0,
        world=dict(corpus=str(corpus_folder)),
        tokenizer=given,
        pretraining=settings | pretraining,
    )
