"""Emu's rollout of an image's codes from a caption, as a program to compile for a TPU topology.

The visual decoder is trained on rollouts of millions of captions, which the stage `rollouts` makes once.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.decode import image_rollout
from rag_mm.decode.sampler import Prompts
from rag_mm.models.emu.emu_config import EmuConfig
from rag_mm.nn import param_trees
from rag_mm.nn.decoder import Mixture
from rag_mm.perf import chips, flops
from rag_mm.perf.plan import emu_programs, programs, traffic

MAX_TENSOR = 8  # Chips that share a layer: those of one side of a torus.
PROMPTS_PER_PART = 64
PROMPT_LEN = 64


@dataclasses.dataclass(frozen=True)
class RolloutCase:
    """What is planned.

    Attributes:
        model: Emu; its tower and its head over words are not read.
        mesh_shape: data, fsdp, tensor.
        batch_size: captions that are rolled out at once.
        prompt_len: tokens of a caption, with [IMG] at its end.
    """

    model: EmuConfig
    mesh_shape: tuple[int, int, int]
    batch_size: int
    prompt_len: int


def make_case(
    page: emu_programs.EmuPlanPage,
    topology: chips.Topology,
    *,
    prompt_len: int = PROMPT_LEN,
    batch_size: int | None = None,
    mesh_shape: tuple[int, int, int] | None = None,
) -> RolloutCase:
    """The rollouts of a page's model.

    Args:
        page: the model.
        topology: the target.
        prompt_len: tokens of a caption.
        batch_size: captions at once; None: 64 for each part of the mesh.
        mesh_shape: data, fsdp, tensor; None: layers are split over up to 8 chips, the batch over the rest.

    Raises:
        UserError: no room for the image, or the batch does not split.
    """
    decoder, num_slots = page.model.decoder, page.model.num_slots
    if not 1 <= prompt_len <= decoder.max_seq_len - num_slots:
        raise UserError(
            f"A prompt of {prompt_len} tokens and the {num_slots} codes of an image do not fit a sequence of "
            f"{decoder.max_seq_len}; give --decode a number from 1 to {decoder.max_seq_len - num_slots}."
        )
    per_slice = topology.num_chips // topology.num_slices
    heads = [decoder.num_heads, page.model.cformer.num_heads, page.model.vision.vision.num_heads]
    fits = lambda n: not any(size % n for size in (per_slice, *heads))
    tensor = max(n for n in range(1, MAX_TENSOR + 1) if fits(n))
    shape = mesh_shape or (topology.num_chips // tensor, 1, tensor)
    shards = shape[0] * shape[1]
    batch_size = batch_size or PROMPTS_PER_PART * shards
    if batch_size % shards:
        raise UserError(
            f"A batch of {batch_size} captions does not split over data x fsdp = {shards}; use a multiple "
            f"of {shards}."
        )
    return RolloutCase(page.model, shape, batch_size, prompt_len)


def make_program(case: RolloutCase) -> programs.Program:
    """The case as a program to compile."""
    return programs.Program(
        partial(lower, case),
        case.mesh_shape,
        lambda compiled: _costs(case),
        {
            "num_params": emu_programs.count_params(case.model),
            "program": "rollouts",
            "batch_size": case.batch_size,
            "num_parts": 1,
            "seq_len": case.prompt_len,
            "codes_per_image": case.model.num_slots,
            "remat": "none",
        },
    )


def _costs(case: RolloutCase) -> programs.Costs:
    """The decoder's layers: once over the caption, then once for each code but the last."""
    decoder, num_slots = case.model.decoder, case.model.num_slots
    data, fsdp, tensor = case.mesh_shape
    head = 2 * decoder.vocab_size * decoder.embed_dim
    prefill = case.prompt_len * (flops.forward_flops(decoder, case.prompt_len) - head)
    keys = case.prompt_len + num_slots / 2
    steps = (num_slots - 1) * (flops.decode_flops(decoder, round(keys)) - head)
    # Every pass reads all layers; a step also reads the keys and values so far.
    narrow = jnp.dtype(decoder.dtype).itemsize
    layers = flops.multiplied_params(decoder) - head // 2
    read: float = num_slots * layers
    read += (num_slots - 1) * case.batch_size / (data * fsdp) * traffic.cache_size(decoder, keys)
    each = prefill + steps
    return programs.Costs("image", case.batch_size, each, each, narrow * read / tensor)


def lower(case: RolloutCase, mesh: Mesh) -> jax.stages.Lowered:
    """Prefill and scan of `decode.image_rollout` on abstract captions, padded to one length.

    Raises:
        UserError: a parameter does not split over the mesh.
    """
    graphdef, params = param_trees.describe(partial(emu_programs.make_model, case.model), mesh)
    param_trees.check_split(params, "Give another --mesh")
    layout = NamedSharding(mesh, PartitionSpec(sharding.ACTIVATION_AXES["batch"]))
    spec = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
    rows = case.batch_size, case.prompt_len
    ids = spec(jnp.int32, *rows)
    vectors = spec(jnp.float32, *rows, case.model.decoder.embed_dim)
    mixture = Mixture(ids, vectors, spec(jnp.bool_, *rows))
    prompts = Prompts(mixture, ids, ids, spec(jnp.int32, case.batch_size))
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        return image_rollout.lower(params, prompts, graphdef=graphdef)
