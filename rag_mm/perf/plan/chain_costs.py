"""What the commands of a chain over a corpus take for a number of documents: hours on a topology, and disk.

Reckoned from FLOPs and published peaks: nothing is compiled here, and nothing was measured. Every document is
a text and an image, and all are in the memory too; a search compares a query with every row of it, which are
split over all chips. What hosts do, which is to read, decode and write pictures, is not included.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rag_mm.core import configuration
from rag_mm.core.errors import UserError
from rag_mm.models import clip, vqgan
from rag_mm.perf import chips, flops, traced_flops
from rag_mm.perf.plan import cases, chain_sizes, decoder_programs
from rag_mm.perf.plan.chain_sizes import ChainSizes

UTILIZATION = 0.4  # Of the peak FLOPs, assumed in `hours`.
_QUERIES = 2  # Of a document: its text and its image.
_TOGETHER = 1024  # Queries of a search at a time, as in `corpus neighbors`.
_NEIGHBORS = 2  # Of each query.
_VIEWS = 3  # Embeddings of a memory's document, kept in its record and in an array of their own.
# Beside texts and codes: id, license, ArrayRecord's header and checksum, and arrays of lengths and hashes;
# 115 in the corpora of `rag-mm bench corpus`.
_RECORD_BYTES = 115
_PIXEL_BYTES = 2  # Of a photograph as PNG, assumed; 3 before compression.
_TRAINED_BYTES = 12  # A weight and two moments in float32.


@dataclasses.dataclass(frozen=True)
class ModelCosts:
    """FLOPs of the models that a chain is given.

    Attributes:
        encode: of the codes of one image.
        embed_image, embed_text: of one embedding.
        dim: width of an embedding.
        num_codes: codes of an image.
    """

    encode: int
    embed_image: int
    embed_text: int
    dim: int
    num_codes: int


def model_costs(sizes: ChainSizes) -> ModelCosts:
    """Counts the FLOPs of matrix products and convolutions of one document.

    Raises:
        UserError: codes do not divide the image, or there is no such retriever.
    """
    halvings = round(np.log2(sizes.code_size))
    # As Chameleon's, whose five scales are of 16-pixel codes.
    widths = (1, 1, 2, 2, 4)[: halvings + 1] if halvings >= 4 else (1, 1, 2, 4)[: halvings + 1]
    if 2**halvings != sizes.code_size or halvings > 4 or sizes.image_size % sizes.code_size:
        raise UserError(
            f"code_size is {sizes.code_size}; give a power of two of at most 16 that divides "
            f"image_size={sizes.image_size}."
        )
    tokenizer = vqgan.VQGANConfig(
        image_size=sizes.image_size,
        width_multipliers=widths,
        codebook_size=sizes.vocab_size - sizes.code_offset,
    )
    encoder = {"b32": clip.CLIPConfig.b32, "l14": clip.CLIPConfig.l14}[sizes.retriever]()
    side, texts = encoder.image_size, jax.ShapeDtypeStruct((1, encoder.max_text_len), jnp.int32)
    picture = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    image = jax.ShapeDtypeStruct((1, sizes.image_size, sizes.image_size, 3), jnp.float32)
    towers = nnx.eval_shape(lambda: clip.CLIP(encoder, rngs=nnx.Rngs(params=0)))
    encoding = nnx.eval_shape(lambda: vqgan.VQGAN(tokenizer, rngs=nnx.Rngs(params=0)))
    return ModelCosts(
        encode=_count(encoding, "encode", image),
        embed_image=_count(towers, "encode_image", picture),
        embed_text=_count(towers, "encode_text", texts),
        dim=encoder.projection_dim,
        num_codes=tokenizer.num_codes,
    )


def reckon(page: Mapping[str, Any], num_documents: int, topology: chips.Topology) -> dict[str, Any]:
    """The costs of each command.

    Args:
        page: plain values of a chain's page, without defaults or with them.
        num_documents: of the corpus, and of the memory.
        topology: the accelerators that all commands use.

    Returns:
        `documents`; `models`, `ModelCosts` as a dictionary; `commands`: by name, `flops`, `hours_at_peak` and
        `hours`, at `UTILIZATION` of the peak FLOPs, a search at the slower of that and of the memory's
        bandwidth; `bytes` by folder, and of one checkpoint; `passes`, how often training reads each document
        as the main one, and `tokens` of training.

    Raises:
        UserError: there are no documents, or as of `model_costs`.
    """
    if num_documents < 1:
        raise UserError(f"--documents is {num_documents}; give at least 1.")
    sizes = configuration.make(ChainSizes, page[chain_sizes.KEY], chain_sizes.KEY)
    trained = configuration.fill(chain_sizes.model_page(page), cases.sections)
    model = configuration.make(cases.FAMILIES[sizes.family], trained["model"], "model")
    models = model_costs(sizes)
    embed = num_documents * (models.embed_image + models.embed_text)
    searched = 2 * _QUERIES * num_documents**2 * models.dim
    batches = -(-num_documents // _TOGETHER) * _QUERIES
    reading = batches * num_documents * models.dim * 2 / topology.chip.hbm_bandwidth
    decoder = model.decoder
    tokens = trained["num_steps"] * trained["batch_size"] * decoder.max_seq_len
    counts = {
        "corpus build": (num_documents * models.encode, 0),
        "memory build": (embed, 0),
        # It also encodes the memory's images, whose codes training reads.
        "corpus neighbors": (num_documents * models.encode + embed, searched),
        "train": (tokens * flops.train_flops(decoder, decoder.max_seq_len), 0),
    }
    commands = {
        name: {
            "flops": float(sum(each)),
            "hours_at_peak": _hours(*each, reading, topology, 1.0),
            "hours": _hours(*each, reading, topology, UTILIZATION),
        }
        for name, each in counts.items()
    }
    weights = page[chain_sizes.STAGE]["sequences"].get("num_docs_weights", (1, 1, 1))
    per_sequence = 1 + np.average(np.arange(len(weights)), weights=weights)
    mean_length = 1 + per_sequence * (models.num_codes + sizes.text_len + 2)
    return {
        "documents": num_documents,
        "models": dataclasses.asdict(models),
        "utilization": UTILIZATION,
        "commands": commands,
        "bytes": folder_bytes(sizes, models, num_documents)
        | {"checkpoint": _TRAINED_BYTES * decoder_programs.count_params(model)},
        "tokens": tokens,
        "passes": float(tokens / mean_length / num_documents),
    }


def folder_bytes(sizes: ChainSizes, models: ModelCosts, num_documents: int) -> dict[str, int]:
    """Bytes on disk of corpus, its neighbors and the memory."""
    smallest = lambda count: np.min_scalar_type(count - 1).itemsize
    codes = models.num_codes * smallest(sizes.vocab_size - sizes.code_offset)
    document = codes + sizes.text_len * smallest(sizes.code_offset) + _RECORD_BYTES
    vectors = 2 * _VIEWS * 4 * models.dim
    picture = _PIXEL_BYTES * sizes.image_size**2
    return {
        "corpus": num_documents * document,
        "neighbors": num_documents * (document + 4 * _QUERIES * _NEIGHBORS),
        "memory": num_documents * (picture + vectors + _RECORD_BYTES + 4 * sizes.text_len),
    }


def _hours(
    computed: float, searched: float, reading: float, topology: chips.Topology, utilization: float
) -> float:
    """Hours of two numbers of FLOPs, of which the second also reads memory, `reading` seconds of one chip."""
    rate = topology.chip.flops * utilization
    seconds = computed / rate + (max(searched / rate, reading) if searched else 0)
    return seconds / topology.num_chips / 3600


def _count(model: Any, method: str, inputs: jax.ShapeDtypeStruct) -> int:
    graphdef, state = nnx.split(model)
    call = lambda state, x: getattr(nnx.merge(graphdef, state), method)(x)
    return traced_flops.count(call, state, inputs)
