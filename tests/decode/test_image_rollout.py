"""An image's codes from a prompt, with a cache, against running the whole sequence again for each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag_mm.core import image_slots
from rag_mm.core.errors import UserError
from rag_mm.decode import image_rollout
from rag_mm.models.emu import emu_config, emu_model

BASE = emu_config.EmuConfig.tiny()
PCA = emu_config.TargetsConfig("pca", pca_dim=6)


def make(targets):
    config = emu_config.EmuConfig(BASE.decoder, BASE.ids, BASE.vision, False, BASE.cformer, targets)
    return config, *nnx.split(emu_model.Emu(config, rngs=nnx.Rngs(0)), nnx.Param)


def make_rows(config):
    """Two images and text; the empty prompt; and text alone."""
    parts = [[None, [3, 4, 5], None], [], [[7, 8]]]
    rows = [
        image_slots.interleave(each, config.ids, config.num_slots, starts_image=True)
        for each in parts
    ]
    rng, n = np.random.default_rng(0), config.num_slots
    counts = (2 * n, 0, 0)
    vectors = [rng.normal(size=(k, config.decoder.embed_dim)).astype(np.float32) for k in counts]
    return rows, vectors


def recompute(graphdef, params, rows, vectors):
    """Appends one code after the other, and runs the sequence without a cache each time."""

    @jax.jit
    def run(params, tokens, x, is_given, at):
        emu = nnx.merge(graphdef, params)
        x = jnp.where(is_given[:, None], x, emu.decoder.input_vectors(tokens[None])[0])
        codes = []
        for k in range(emu.config.num_slots):  # What is behind a position does not change it.
            positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]
            code = emu.regress(emu.decoder(x[None], positions, None))[:, at + k]
            x = x.at[at + k + 1].set(emu.to_vectors(code[:, None], k)[0, 0])
            codes.append(code)
        return jnp.concatenate(codes)

    found = []
    for row, own in zip(rows, vectors, strict=True):
        tokens, x = np.zeros(24, np.int32), np.zeros((24, own.shape[1]), np.float32)
        tokens[: len(row.tokens)] = row.tokens
        at = np.flatnonzero(row.slot >= 0)
        x[at] = own[row.slot[at]]
        found.append(run(params, tokens, x, np.isin(np.arange(24), at), len(row.tokens) - 1))
    return np.stack(found)


@pytest.mark.parametrize("targets", [emu_config.TargetsConfig(), PCA], ids=["paper", "pca"])
def test_cached_rollouts_of_mixed_lengths_are_the_recomputed_ones(targets):
    config, graphdef, params = make(targets)
    rows, vectors = make_rows(config)
    prompts = image_rollout.stack_prompts(rows, vectors)
    params = nnx.to_pure_dict(params)
    found = image_rollout.roll_out(params, prompts, graphdef=graphdef, is_scanned=False)
    assert found.shape == (3, config.num_slots, config.code_dim) and found.dtype == np.float32
    expected = recompute(graphdef, params, rows, vectors)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-2
    if targets == PCA:
        return
    scanned = image_rollout.roll_out(params, prompts, graphdef=graphdef, is_scanned=True)
    np.testing.assert_allclose(scanned, found, atol=1e-5)
    # The empty prompt's row does not depend on its neighbours.
    alone = image_rollout.stack_prompts(rows[1:2], vectors[1:2])
    single = image_rollout.roll_out(params, alone, graphdef=graphdef)
    np.testing.assert_allclose(single[0], found[1], atol=1e-5)


def test_a_prompt_that_is_too_long_or_lacks_vectors_is_refused():
    config, *_ = make(emu_config.TargetsConfig())
    rows, vectors = make_rows(config)
    assert image_rollout.stack_prompts(rows, vectors, 30).positions.shape == (3, 30)
    with pytest.raises(ValueError, match="longer than 8"):
        image_rollout.stack_prompts(rows, vectors, 8)
    with pytest.raises(UserError, match="5 vectors of images do not fit the 6 slots"):
        image_rollout.stack_prompts(rows[:1], [vectors[0][1:]])
