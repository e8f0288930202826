"""How many sequences are decoded at once, as many as fit into memory, and their split over a mesh."""

import math
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.nn.param_trees import Params

T = TypeVar("T")
# A CPU decodes no faster with more sequences. Its budget does not follow the momentary load, so that a stage
# that runs again makes the same batches and rounds alike.
CPU_BATCH, CPU_BYTES = 64, 4 << 30
DEVICE_BATCH, DEVICE_SHARE = 512, 0.8


def sequences_that_fit(
    config: DecoderConfig,
    prompt_len: int,
    num_steps: int,
    available: float,
    num_streams: int = 1,
    num_drafts: int = 1,
) -> int:
    """The largest power of two of examples whose decoding takes at most `available` bytes; at least 1.

    Args:
        config: the decoder's.
        prompt_len, num_steps: tokens of the longest prompt, and after it.
        available: bytes, beside the parameters.
        num_streams: sequences per example.
        num_drafts: tokens that a pass decodes at once after the prompt.
    """
    each = num_streams * bytes_per_sequence(config, prompt_len, num_steps, num_drafts)
    return 1 << max(int(available / each).bit_length() - 1, 0)


def bytes_per_sequence(
    config: DecoderConfig, prompt_len: int, num_steps: int, num_drafts: int = 1
) -> int:
    """Bytes that one sequence adds to a decoding program, beside the parameters.

    The cache, the prompt's keys and values that it is made from, one layer's activations for the whole
    prompt with its scores in float32, and float32 logits of all drafts. A bound: kernels that store no
    scores need less.
    """
    block, size = config.block, jnp.dtype(config.dtype).itemsize
    heads = 2 * block.num_kv_heads * block.head_dim
    cached = config.num_layers * heads * (2 * prompt_len + num_steps) * size
    queries = block.num_heads * block.head_dim
    wide = 4 * config.embed_dim + 3 * config.mlp_dim + 4 * queries + heads
    longest = max(prompt_len, num_drafts)
    pairs = max(prompt_len * prompt_len, num_drafts * (prompt_len + num_steps))
    scores = 2 * block.num_heads * pairs
    logits = 8 * config.vocab_size * num_drafts
    # Rotations of all positions, scores of a step, and what is recorded of it.
    steps = (prompt_len + num_steps) * (2 * block.head_dim + block.num_heads + 8)
    return cached + 4 * (wide * longest + scores + logits + steps)


def batch_size(
    config: DecoderConfig,
    params: Params,
    prompt_len: int,
    num_steps: int,
    num_streams: int = 1,
    num_drafts: int = 1,
) -> int:
    """How many examples to decode at once where the parameters are; see `sequences_that_fit`.

    CPUs: a quarter of the machine's memory, at most CPU_BYTES, and at most CPU_BATCH examples. Devices with
    memory statistics: DEVICE_SHARE of what is free, and at most DEVICE_BATCH examples on each part of a mesh.
    """
    leaf, mesh = jax.tree.leaves(params)[0], mesh_of(params)
    device = min(leaf.devices(), key=lambda d: d.id) if isinstance(leaf, jax.Array) else None
    device = jax.local_devices()[0] if device is None else device
    statistics = device.memory_stats() or {} if device.platform != "cpu" else {}
    if "bytes_limit" in statistics:
        free = statistics["bytes_limit"] - statistics["bytes_in_use"]
        available, most = DEVICE_SHARE * free, DEVICE_BATCH
    else:
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available, most = min(ram / 4, CPU_BYTES), CPU_BATCH
    sizes = prompt_len, num_steps, available, num_streams, num_drafts
    size = min(most, sequences_that_fit(config, *sizes))
    return size * parts_of(mesh)


def make_mesh(axes: Sequence[int] | None) -> Mesh | None:
    """The mesh on which a model is loaded to decode; None: on one device.

    Args:
        axes: numbers of devices along `data` and `fsdp`, which split the examples of a batch, and along
            `tensor`, which splits heads and cache; None, or all 1: one device.

    Raises:
        UserError: they are not three numbers of at least 1, or there are fewer devices.
    """
    if axes is None:
        return None
    if len(axes) != 3 or min(axes) < 1:
        raise UserError(
            f"mesh is {tuple(axes)}; give numbers of devices along data, fsdp and tensor, each at least 1."
        )
    needed, present = math.prod(axes), jax.local_device_count()
    if needed > present:
        raise UserError(f"mesh is {tuple(axes)}, {needed} devices, but there are {present}.")
    return sharding.make_mesh(*axes) if needed > 1 else None


def mesh_of(params: Params) -> Mesh | None:
    """The mesh that the parameters are split over; None for one device, and while tracing."""
    leaf = jax.tree.leaves(params)[0]
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
        return None
    layout = leaf.sharding
    is_mesh = isinstance(layout, NamedSharding) and isinstance(layout.mesh, Mesh)
    return layout.mesh if is_mesh and layout.mesh.size > 1 else None


def parts_of(mesh: Mesh | None) -> int:
    """The number of parts that a batch is split into."""
    if mesh is None:
        return 1
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return sharding.batch_parts()


def run_on_mesh(mesh: Mesh, run: Callable[..., T], batch: dict) -> T:
    """`run(**batch)` with arrays [B, ...] split over the mesh; cuts the result's arrays to B examples.

    The last example fills the batch up to a multiple of the parts.
    """
    num_rows = len(jax.tree.leaves(batch)[0])
    num_padded = -num_rows % parts_of(mesh)
    if num_padded:
        fill = lambda x: np.pad(x, ((0, num_padded),) + ((0, 0),) * (x.ndim - 1), mode="edge")
        batch = jax.tree.map(fill, batch)
    with jax.set_mesh(mesh):
        result = run(**sharding.put_batch(batch, mesh))
    return jax.tree.map(lambda x: np.asarray(x)[:num_rows], result) if num_padded else result
