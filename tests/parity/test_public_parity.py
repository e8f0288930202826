"""Public families against transformers: golden files, gradients, every layer, and export."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peer
import pytest
import tiny
from flax import nnx

from rag_mm.api import exporting, imported, importing
from rag_mm.convert import table
from rag_mm.models import vqgan
from rag_mm.nn import param_trees
from rag_mm.nn.decoder import Decoder
from rag_mm.ops import attention, losses

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers")
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def both(torch, tmp_path_factory):
    """name -> (transformers' model, the imported run's folder)."""

    @functools.cache
    def open_both(name):
        place = tmp_path_factory.mktemp(name)
        folder = tiny.write(place / "theirs", name, max_bytes=20_000)
        importing.import_checkpoint(tiny.CHECKPOINTS[name][0], folder, place / "run")
        return peer.load(folder), place / "run"

    return open_both


@pytest.mark.parametrize("name", tiny.CHECKPOINTS)
def test_golden_files_match_the_installed_transformers(torch, tmp_path, name):
    found = peer.compute(name, tiny.write(tmp_path, name))
    with np.load(peer.GOLDEN / f"{name}.npz", allow_pickle=False) as golden:
        assert set(golden) == set(found)
        for key, value in golden.items():
            np.testing.assert_allclose(found[key], value, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(
    "name", [n for n in tiny.LANGUAGE if n not in ("llama_3", "chameleon_swin")]
)
def test_greedy_generation_token_for_token(both, name):
    """The checkpoints that test_golden.py leaves out."""
    theirs, run = both(name)
    found = imported.load(run).generate(tiny.PROMPTS, num_tokens=tiny.NUM_TOKENS)
    assert found.tokens == peer.language(theirs)["written"].tolist()


@pytest.mark.parametrize("name", ["llama_3", "llama_gqa", "chameleon", "chameleon_swin"])
def test_every_layer(torch, both, name):
    theirs, run = both(name)
    tokens = tiny.tokens((2, 17))
    with torch.no_grad():
        expected = theirs.model(
            torch.tensor(tokens).long(), output_hidden_states=True
        ).hidden_states
    ours = imported.load(run)

    @jax.jit
    def forward(params):
        model = nnx.merge(ours.graphdef, params)
        positions = jnp.tile(jnp.arange(17, dtype=jnp.int32), (2, 1))
        attend = lambda heads, handed: (
            attention.attention(heads.q, heads.k, heads.v, is_causal=True),
            handed,
        )
        states = [model.embed(jnp.asarray(tokens), positions)]
        rotation = model.config.block.rotation(positions)
        for block in model.stack.unstack():
            states.append(block(states[-1], rotation, attend)[0])
        states[-1] = model.norm(states[-1])  # As in transformers, the last state is after the norm.
        return states

    states = forward(ours.params)
    assert len(states) == len(expected) == 4
    for layer, (found, other) in enumerate(zip(states, expected, strict=True)):
        np.testing.assert_allclose(found, other.numpy(), atol=1e-4, err_msg=f"layer {layer}")


@pytest.mark.parametrize(
    "name", ["llama_tied", "llama_3", "llama_bias", "chameleon", "chameleon_swin"]
)
def test_gradients_of_a_batch(torch, both, name):
    """Of every tensor, by its name in the checkpoint."""
    theirs, run = both(name)
    tokens = tiny.tokens((3, 18), seed=5)
    if name in tiny.CHAMELEONS:  # transformers gives image tokens probability 0.
        tokens[np.isin(tokens, imported.load(run).model.code_tokens)] = 2
    theirs.zero_grad()
    theirs(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss.backward()
    ours = imported.load(run)
    is_chameleon = name in tiny.CHAMELEONS
    masked = jnp.asarray(ours.model.code_tokens if is_chameleon else [], jnp.int32)

    @jax.jit
    @jax.grad
    def gradients(params):
        model: Decoder = nnx.merge(ours.graphdef, params)
        positions = jnp.tile(jnp.arange(17, dtype=jnp.int32), (3, 1))
        hidden = model(jnp.asarray(tokens[:, :-1]), positions, jnp.ones((3, 17), jnp.int32))
        logits = model.logits(hidden).at[:, :, masked].set(-1e30)
        return losses.token_nll(logits, jnp.asarray(tokens[:, 1:])).mean()

    found = param_trees.leaves_by_path(gradients(ours.params))
    prefix = "decoder/" if is_chameleon else ""
    model = exporting.open_model(tiny.CHECKPOINTS[name][0], run)
    mappings = importing.FAMILIES[tiny.CHECKPOINTS[name][0]].mappings(model.config)
    source = exporting.TreeSource({prefix + path: value for path, value in found.items()})
    expected = dict(theirs.named_parameters())
    compared = [mapping for mapping in mappings if mapping.ours in source.arrays]
    assert len(compared) >= 29
    for mapping in compared:
        np.testing.assert_allclose(
            source.read(mapping),
            expected[mapping.theirs].grad.numpy(),
            atol=1e-4,
            err_msg=mapping.theirs,
        )
        assert np.abs(source.read(mapping)).max() > 1e-5, mapping.theirs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama_3", "chameleon", "clip_legacy", "siglip2_naflex"])
def test_from_pretrained_loads_our_exports(torch, both, tmp_path, name, dtype):
    theirs, run = both(name)
    family = tiny.CHECKPOINTS[name][0]
    exporting.export_checkpoint(family, run, tmp_path / "b", 20_000, importing.find_dtype(dtype))
    again = peer.load(tmp_path / "b")
    assert again.dtype == getattr(torch, dtype)
    expected = theirs.state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype)), key


def test_the_image_decoder_is_the_vqgan_of_janus(torch, tmp_path):
    """Chameleon's published checkpoints lack it; transformers' Janus has the same architecture."""
    from transformers.models.janus import configuration_janus, modeling_janus

    torch.manual_seed(0)
    sizes = dict(latent_channels=10, base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1)
    theirs = modeling_janus.JanusVQVAEDecoder(
        configuration_janus.JanusVQVAEConfig(embed_dim=6, num_embeddings=16, **sizes)
    ).eval()
    config = vqgan.VQGANConfig(
        image_size=16,
        width=32,
        width_multipliers=(1, 2),
        num_res_blocks=1,
        attention_sizes=(8,),  # Janus attends on the smallest grid going up.
        latent_dim=10,
        embed_dim=6,
        codebook_size=16,
        has_decoder=True,
    )
    graphdef, abstract = table.Family.describe(_vq_family(), config)
    weights = {f"model.vqmodel.decoder.{k}": v.numpy() for k, v in theirs.state_dict().items()}
    # In Janus up.0 is the smallest grid, in the VQGAN the largest.
    swapped = {_swap(name): value for name, value in weights.items()}
    leaves, used = {}, set()
    for mapping in table.apply_rules(abstract, _vq_rules()):
        if mapping.theirs in swapped:
            leaves[mapping.ours] = mapping.transform.load(
                swapped[mapping.theirs], mapping.ours_shape
            )
            used.add(mapping.theirs)
        else:
            leaves[mapping.ours] = np.zeros(mapping.ours_shape, np.float32)
    assert used == set(swapped)
    params = jax.tree.unflatten(
        jax.tree.structure(abstract),
        [jnp.asarray(leaves[p]) for p in param_trees.leaves_by_path(abstract)],
    )
    z = np.random.default_rng(0).standard_normal((2, 8, 8, 10)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(z.transpose(0, 3, 1, 2))).permute(0, 2, 3, 1).numpy()
    found = nnx.merge(graphdef, params).decoder(jnp.asarray(z))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def _swap(name: str) -> str:
    parts = name.split(".")
    if parts[3] == "up":
        parts[4] = str(1 - int(parts[4]))
    return ".".join(parts)


def _vq_family() -> table.Family:
    from rag_mm.convert import chameleon_format

    make = lambda config: vqgan.VQGAN(config, rngs=nnx.Rngs(0))
    return table.Family(
        "vq",
        vqgan.VQGANConfig,
        *[chameleon_format.read_config] * 2,
        make,
        lambda c: [],
    )


def _vq_rules() -> list[table.Rule]:
    import dataclasses

    from rag_mm.convert import chameleon_format

    family = importing.FAMILIES["chameleon"]
    config = family.read_config(table.CheckpointFolder(tiny.CHECKPOINTS["chameleon"][1]))
    found = [r for r in chameleon_format.rules(config) if r.ours.startswith("vq/")]
    return [dataclasses.replace(r, ours=r.ours.removeprefix("vq/")) for r in found]
