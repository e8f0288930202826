"""A tiny Emu, and batches for it."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from rag_mm.core import image_slots
from rag_mm.models.emu import emu_config, emu_model, emu_objective
from rag_mm.nn import param_trees

PAPER = dataclasses.replace(emu_config.EmuConfig.tiny(), has_tower=False)
STANDARDISED = dataclasses.replace(
    PAPER,
    targets=emu_config.TargetsConfig(
        "standardised",
        anchor_weight=0.5,
        has_positions=True,
        has_class_slot=True,
        standardises_tokens=True,
    ),
)
PCA = dataclasses.replace(
    PAPER, targets=emu_config.TargetsConfig("pca", pca_dim=8, has_class_slot=True)
)
CONFIGS = {"paper": PAPER, "standardised": STANDARDISED, "pca": PCA}


def make_model(config):
    return emu_model.Emu(config, rngs=nnx.Rngs(0))


@functools.cache
def split(name):
    """Structure and parameters of one of CONFIGS; norms and biases are no longer ones and zeros."""
    graphdef, params = nnx.split(make_model(CONFIGS[name]), nnx.Param)
    rng = np.random.default_rng(1)

    def vary(path, leaf):
        is_plain = path[-1].key in ("scale", "bias", "std") or path[0].key in ("queries",)
        value = np.asarray(leaf, np.float32)
        return value + 0.2 * rng.random(value.shape, np.float32) if is_plain else value

    return graphdef, jax.tree_util.tree_map_with_path(vary, nnx.to_pure_dict(params))


def make_batch(config, rows, num_images=2, seed=0, length=None):
    """A batch of rows that `interleave` made, each of one segment, with random tokens of images."""
    length = length or max(len(row.tokens) for row in rows)
    c, names = config, ("tokens", "targets", "positions", "segment_ids", "slot")
    batch = {name: np.zeros((len(rows), length), np.int32) for name in names}
    batch["tokens"][:], batch["targets"][:], batch["slot"][:] = c.ids.pad, c.ids.pad, -1
    for i, row in enumerate(rows):
        n = len(row.tokens)
        batch["tokens"][i, :n], batch["targets"][i, : n - 1] = row.tokens, row.tokens[1:]
        batch["slot"][i, :n], batch["segment_ids"][i, :n] = row.slot, 1
        batch["positions"][i, :n] = np.arange(n)
    shape = (len(rows), num_images, c.vision.num_tokens, c.vision.vision.embed_dim)
    batch["image_tokens"] = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return batch


def written_rows(config):
    """Text first, image first, two images with text between, and text alone."""
    make = functools.partial(
        image_slots.interleave, ids=config.ids, num_slots=config.num_slots, has_end=True
    )
    parts = [[[5, 6], None], [None, [7]], [None, [5, 9, 8], None], [[4, 4]]]
    return [make(each) for each in parts]


@functools.cache
def compiled(name):
    """params, batch -> ((loss, metrics), gradient)."""
    graphdef, _ = split(name)

    def loss(params, batch):
        return emu_objective.loss_fn(nnx.merge(graphdef, params), batch, jax.random.key(0))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def describe(name, mesh=None):
    return param_trees.describe(functools.partial(make_model, CONFIGS[name]), mesh)
