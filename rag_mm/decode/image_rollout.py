"""An image's codes from a prompt: one prefill, then one compiled scan with the KV cache (Emu).

A step maps the last hidden state through the regression head, and puts the code into the next slot. There is
no randomness: codes are the conditional mean, and equal those of running the whole sequence again for each.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from rag_mm.core.errors import UserError
from rag_mm.core.image_slots import SlottedIds
from rag_mm.decode import cache, decode_batch
from rag_mm.decode.sampler import Prompts
from rag_mm.models.emu.emu_model import Emu
from rag_mm.nn.decoder import Mixture
from rag_mm.nn.param_trees import Params


def stack_prompts(
    rows: Sequence[SlottedIds],
    vectors: Sequence[Float[np.ndarray, "_ D"]],
    length: int | None = None,
) -> Prompts:
    """Prompts of ids and vectors, padded on the left.

    Args:
        rows: one of `image_slots.interleave` for each prompt.
        vectors: for each prompt those of its images, J = images * N; of any J, also 0.
        length: of the prompts; None: the longest one's.

    Raises:
        UserError: a prompt has other slots than vectors.
        ValueError: a prompt is longer than `length`.
    """
    length = max(len(row.tokens) for row in rows) if length is None else length
    tokens, positions, segment_ids = np.zeros((3, len(rows), length), np.int32)
    placed = np.zeros((len(rows), length, vectors[0].shape[1]), np.float32)
    is_vector = np.zeros((len(rows), length), bool)
    for i, (row, own) in enumerate(zip(rows, vectors, strict=True)):
        first = length - len(row.tokens)
        if first < 0:
            raise ValueError(f"a prompt of {len(row.tokens)} tokens is longer than {length}")
        is_slot = row.slot >= 0
        if is_slot.sum() != len(own):
            raise UserError(
                f"{len(own)} vectors of images do not fit the {is_slot.sum()} slots of a prompt; give the "
                "vectors of each of its images."
            )
        tokens[i, first:], segment_ids[i, first:] = row.tokens, 1
        positions[i, first:] = np.arange(length - first)
        is_vector[i, first:] = is_slot
        placed[i, first:][is_slot] = np.asarray(own, np.float32)[row.slot[is_slot]]
    mixture = Mixture(tokens, placed, is_vector)
    ends = np.array([len(row.tokens) for row in rows], np.int32)
    return Prompts(mixture, positions, segment_ids, ends)


def roll_out(
    params: Params,
    prompts: Prompts,
    *,
    graphdef: nnx.GraphDef,
    is_scanned: bool | None = None,
) -> Float32[Array | np.ndarray, "B N R"]:
    """The codes of the image that follows each prompt.

    Args:
        params: the model's parameters.
        prompts: each ends with `[IMG]` (`interleave(..., starts_image=True)`).
        graphdef: the structure of the whole `Emu`.
        is_scanned: whether a step scans the layers; None: where that is faster.
    """
    run = partial(_roll_out, params, graphdef=graphdef, is_scanned=is_scanned)
    mesh = decode_batch.mesh_of(params)
    if mesh is None:
        return run(prompts=prompts)
    return decode_batch.run_on_mesh(mesh, run, {"prompts": prompts})


def lower(
    params: Params, prompts: Prompts, *, graphdef: nnx.GraphDef, is_scanned: bool | None = None
) -> jax.stages.Lowered:
    """Lowers `roll_out`'s program for abstract arguments, without compiling it."""
    return _roll_out.lower(params, prompts, graphdef=graphdef, is_scanned=is_scanned)


@partial(jax.jit, static_argnames=("graphdef", "is_scanned"))
def _roll_out(
    params: Params, prompts: Prompts, *, graphdef: nnx.GraphDef, is_scanned: bool | None
) -> Float32[Array, "B N R"]:
    model: Emu = nnx.merge(graphdef, params)
    decoder, num_steps = model.decoder, model.config.num_slots
    batch_size, length = prompts.positions.shape
    blocks, is_scanned = cache.layers_of(decoder, (batch_size, length, num_steps), is_scanned)
    hidden, prefilled = decoder.prefill(prompts.tokens, prompts.positions, prompts.segment_ids)
    segment_ids = jnp.pad(prompts.segment_ids, ((0, 0), (0, num_steps)), constant_values=1)
    positions = prompts.next_positions[:, None] + jnp.arange(num_steps, dtype=jnp.int32)[None]
    placed = positions, decoder.config.block.rotation(positions)

    def step(carry: tuple, i: jax.Array) -> tuple[tuple, jax.Array]:
        code, layers = carry
        index = jnp.int32(length) + i
        position, rotation = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1), placed
        )
        attend = cache.make_attend(index, segment_ids, is_scanned)
        vector = model.to_vectors(code, i)
        hidden, kept = decoder.decode_step(blocks, vector, position, rotation, attend, layers)
        layers = cache.write(layers, kept, index) if is_scanned else kept
        return (model.regress(hidden), layers), code

    first = model.regress(hidden[:, -1:]), cache.make_cache(prefilled, num_steps, is_scanned)
    (last, _), codes = jax.lax.scan(step, first, jnp.arange(num_steps - 1, dtype=jnp.int32))
    return jnp.concatenate([jnp.moveaxis(codes[:, :, 0], 0, 1), last], axis=1).astype(jnp.float32)
