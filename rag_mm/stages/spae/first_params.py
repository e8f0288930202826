"""The parameters that SPAE's training starts from: a codebook, and maps that make use of all of it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from rag_mm.models.spae import language_table, networks, objective, spae_config
from rag_mm.nn.param_trees import Params
from rag_mm.ops import images as image_ops
from rag_mm.stages.spae import build_codebook, rank_words

_MAX_PATCHES = 100_000  # Whose principal components the shortcuts start from.


def kmeans(
    make_model: Callable[[], nnx.Module], sample: np.ndarray, seed: int, mesh: Mesh, params: Params
) -> Params:
    """The parameters with a codebook of k-means centers of the images `sample` uint8 [R, H, W, 3]."""
    graphdef = nnx.graphdef(jax.eval_shape(make_model))

    @jax.jit
    def init(params: Params) -> jax.Array:
        return objective.init_codebook(nnx.merge(graphdef, params), sample, jax.random.key(seed))

    with jax.set_mesh(mesh):
        return params | {"codebook": init(params)}


def words(
    config: spae_config.SPAEConfig,
    codebook: build_codebook.LanguageCodebook,
    pools: rank_words.WordPools | None,
    sample: np.ndarray,
    seed: int,
    params: Params,
) -> Params:
    """The parameters with a language codebook, shortcuts that match it, and a guide to each best word.

    Args:
        config: the model's.
        codebook: words and vectors.
        pools: of the training images, for a guided model.
        sample: training images, uint8 [R, H, W, 3].
        seed: of the choice of patches.
        params: the initial parameters.
    """
    params = _replace(params, ("codebook",), codebook.table)
    if config.encoder != "conv":
        patches = _patches(config, sample, seed)
        into, back = language_table.matched_shortcuts(patches, codebook.table)
        params = _replace(params, ("encoder", "shortcut"), into)
        params = _replace(params, ("decoder", "shortcut"), back)
    if config.guide_dim and pools is not None:
        wanted = codebook.table[pools.words[:, 0]]
        guide = language_table.least_squares_guide(pools.embeddings, wanted)
        params = _replace(params, ("guide", "linear"), guide)
    return params


def _patches(config: spae_config.SPAEConfig, images: np.ndarray, seed: int) -> np.ndarray:
    """Patches of one code each, in 0..1: float [P, C], a sample of them."""
    patches = networks.code_patches(image_ops.to_float(images), config)
    flat = np.asarray(patches).reshape(-1, patches.shape[-1])
    return flat[np.random.default_rng((seed, 3)).permutation(len(flat))[:_MAX_PATCHES]]


def _replace(params: Params, path: tuple[str, ...], value: Any) -> Params:
    """The parameters with those under `path` replaced, on the same devices."""
    name, *rest = path
    if rest:
        return params | {name: _replace(params[name], tuple(rest), value)}
    put = lambda new, old: jax.device_put(np.asarray(new, old.dtype), old.sharding)
    return params | {name: jax.tree.map(put, value, params[name])}
