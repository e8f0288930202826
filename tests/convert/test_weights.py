"""Weights from shards to our file, to a mesh and back: bitwise identical in all three dtypes."""

import json

import jax
import numpy as np
import pytest
import tiny
from etils import epath
from flax import nnx

from rag_mm.api import importing
from rag_mm.convert import shards, table, weights
from rag_mm.core import sharding
from rag_mm.core.errors import UserError
from rag_mm.nn import param_trees

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": tiny.BFLOAT16}


def open_checkpoint(folder, name):
    return importing.open_checkpoint(tiny.CHECKPOINTS[name][0], folder)


def bits(array):
    return np.asarray(array).reshape(-1).view(np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama_gqa", "chameleon", "clip"])
def test_import_and_export_are_exact(tmp_path, name, dtype):
    checkpoint = open_checkpoint(
        tiny.write(tmp_path / "a", name, DTYPES[dtype], max_bytes=10_000), name
    )
    path = epath.Path(tmp_path / "params.safetensors")
    progress = []
    weights.write_file(path, checkpoint.mappings, checkpoint.specs, on_progress=progress.append)
    assert progress[-1] == sum(spec.nbytes for spec in checkpoint.specs.values())
    ours = shards.read_header(path)
    exported = epath.Path(tmp_path / "b")
    exported.mkdir()
    weights.write_shards(
        exported,
        checkpoint.mappings,
        lambda mapping: shards.DTYPES[ours[mapping.ours].dtype],
        lambda mapping: weights.read_mapped(ours, mapping),
        max_bytes=25_000,
    )
    specs = shards.open_folder(exported)
    assert set(specs) == set(checkpoint.specs)
    for tensor, spec in checkpoint.specs.items():
        assert (specs[tensor].dtype, specs[tensor].shape) == (spec.dtype, spec.shape)
        np.testing.assert_array_equal(
            bits(shards.read_tensor(specs[tensor])), bits(shards.read_tensor(spec))
        )


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_shards_are_loaded_directly_onto_a_mesh(tmp_path, shape):
    """Every device holds its shard, and the shards together are what one device would hold."""
    name = "llama"
    checkpoint = open_checkpoint(
        tiny.write(tmp_path / "a", name, tiny.BFLOAT16, max_bytes=10_000), name
    )
    mesh = sharding.make_mesh(*shape)
    abstract = checkpoint.family.describe(checkpoint.config, mesh)[1]
    params = weights.load_shards(checkpoint.mappings, checkpoint.specs, abstract)
    alone = weights.load_shards(
        checkpoint.mappings,
        checkpoint.specs,
        checkpoint.family.describe(checkpoint.config)[1],
        np.dtype(np.float32),
    )
    for path, leaf in param_trees.leaves_by_path(params).items():
        assert leaf.sharding == param_trees.leaves_by_path(abstract)[path].sharding, path
        assert leaf.dtype == tiny.BFLOAT16
        whole = np.asarray(param_trees.leaves_by_path(alone)[path])
        np.testing.assert_array_equal(np.asarray(leaf).astype(np.float32), whole)
    if shape == (1, 4, 2):  # embed over 4, heads over 2
        kernel = params["stack"]["blocks"]["attention"]["q"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (3, 8, 2, 8)


def test_our_file_is_loaded_onto_a_mesh(tmp_path):
    checkpoint = open_checkpoint(tiny.write(tmp_path / "a", "llama_gqa"), "llama_gqa")
    path = epath.Path(tmp_path / "params.safetensors")
    weights.write_file(path, checkpoint.mappings, checkpoint.specs)
    abstract = checkpoint.family.describe(checkpoint.config, sharding.make_mesh(1, 2, 2))[1]
    from_file = weights.load_file(path, abstract)
    from_shards = weights.load_shards(checkpoint.mappings, checkpoint.specs, abstract)
    jax.tree.map(np.testing.assert_array_equal, from_file, from_shards)
    other = importing.FAMILIES["clip"].describe(_config("clip"))[1]
    with pytest.raises(UserError, match="does not hold the parameters of the model"):
        weights.load_file(path, other)


def _config(name):
    family, values = tiny.CHECKPOINTS[name]
    return importing.FAMILIES[family].read_config(table.CheckpointFolder(values))


def test_casting_rounds_once(tmp_path):
    checkpoint = open_checkpoint(tiny.write(tmp_path / "a", "llama"), "llama")
    path = epath.Path(tmp_path / "params.safetensors")
    weights.write_file(path, checkpoint.mappings, checkpoint.specs, np.dtype(tiny.BFLOAT16))
    spec = shards.layer_spec(shards.read_header(path)["stack/blocks/mlp/up/kernel"], 2)
    theirs = shards.read_tensor(checkpoint.specs["model.layers.2.mlp.up_proj.weight"])
    np.testing.assert_array_equal(shards.read_tensor(spec), theirs.T.astype(tiny.BFLOAT16))


def rewrite(folder, change):
    """Rewrites a single-file checkpoint with other tensors."""
    specs = shards.open_folder(epath.Path(folder))
    arrays = change({name: shards.read_tensor(spec) for name, spec in specs.items()})
    shapes = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    shards.write_folder(folder, shapes, arrays.__getitem__, 1 << 30)


NORM, QUERY = "model.layers.1.input_layernorm.weight", "model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {k: v for k, v in t.items() if k != QUERY}, f"lacks {QUERY}"),
        (lambda t: t | {"model.extra": t[NORM]}, "holds model.extra"),
        (lambda t: t | {QUERY: t[QUERY][:-1]}, rf"{QUERY} has shape \[31, 32\]"),
        (lambda t: t | {QUERY: t[QUERY].astype(np.float16)}, "is F16, but F32 in other layers"),
    ],
    ids=["missing", "unexpected", "shape", "dtype"],
)
def test_tensors_that_do_not_match_the_model_are_rejected_by_name(tmp_path, change, reason):
    folder = tiny.write(tmp_path / "a", "llama")
    rewrite(folder, change)
    with pytest.raises(UserError, match=reason):
        open_checkpoint(folder, "llama")


def test_buffers_and_a_tied_head_are_ignored(tmp_path):
    folder = tiny.write(tmp_path / "a", "llama_tied")
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(
        folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"], rotary: t[NORM]}
    )
    assert rotary not in {
        mapping.theirs for mapping in open_checkpoint(folder, "llama_tied").mappings
    }
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    assert "lm_head.weight" in {
        mapping.theirs for mapping in open_checkpoint(folder, "llama").mappings
    }


def test_integer_weights_are_rejected(tmp_path):
    folder = tiny.write(tmp_path / "a", "llama")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    assert data.count(b'"F32"') > 20
    path.write_bytes(data.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(UserError, match="has dtype I32"):
        open_checkpoint(folder, "llama")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (16, 3), (33, 40), (0, 5), (5, 0)], ids=str)
def test_transposing_in_bands_equals_transposing(shape, dtype):
    matrix = np.arange(shape[0] * shape[1]).reshape(shape).astype(DTYPES[dtype])
    np.testing.assert_array_equal(table.transpose(matrix), matrix.T)
    assert table.transpose(matrix).flags.c_contiguous


@pytest.mark.parametrize("name", ["chameleon_swin"])
def test_logits_on_four_devices_equal_those_on_one(tmp_path, name):
    """Per-head norms of q and k are sharded with the heads."""
    checkpoint = open_checkpoint(tiny.write(tmp_path / "a", name), name)
    tokens = tiny.tokens((4, 9))
    positions, segment_ids = (
        np.tile(np.arange(9, dtype=np.int32), (4, 1)),
        np.ones((4, 9), np.int32),
    )

    def logits(mesh):
        graphdef, abstract = checkpoint.family.describe(checkpoint.config, mesh)
        params = weights.load_shards(checkpoint.mappings, checkpoint.specs, abstract)
        batch = tokens, positions, segment_ids
        if mesh is not None:
            batch = tuple(sharding.put_batch(dict(enumerate(batch)), mesh).values())

        @jax.jit
        def forward(params, batch):
            model = nnx.merge(graphdef, params)
            model = model.decoder if name.startswith("chameleon") else model
            return model.logits(model(*batch))

        return np.asarray(forward(params, batch))

    mesh = sharding.make_mesh(1, 2, 2)
    with jax.set_mesh(mesh):
        split = logits(mesh)
    np.testing.assert_allclose(split, logits(None), atol=1e-5)
