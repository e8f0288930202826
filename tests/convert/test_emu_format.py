"""Emu's published names: bits there and back, the tower by hand, and weights that are not what they seem."""

import json
import re

import jax
import numpy as np
import pytest
import tiny_emu_folder
from etils import epath
from flax import nnx

from rag_mm.api import exporting, importing
from rag_mm.convert import emu_format, shards, table, weights
from rag_mm.core.errors import UserError
from rag_mm.models import clip


def test_a_checkpoint_comes_back_bit_for_bit_without_what_no_part_uses(tmp_path):
    folder = tiny_emu_folder.write(tmp_path / "theirs", dtype=np.float16)
    importing.import_checkpoint("emu", folder, tmp_path / "run")
    exporting.export_checkpoint("emu", tmp_path / "run", tmp_path / "again", max_bytes=1 << 30)
    before, after = (shards.open_folder(epath.Path(p)) for p in (folder, tmp_path / "again"))
    assert set(before) - set(after) == set(tiny_emu_folder.UNUSED) and set(after) <= set(before)
    for name, spec in after.items():
        assert spec.dtype == "F16"
        found, expected = (shards.read_tensor(each[name]) for each in (after, before))
        np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
    configs = [json.loads((p / "config.json").read_text()) for p in (folder, tmp_path / "again")]
    assert configs[0] == configs[1]


def test_a_written_config_is_read_as_the_same():
    config = emu_format.read_config(table.CheckpointFolder(tiny_emu_folder.make_config(True)))
    written = emu_format.write_config(config)
    assert emu_format.read_config(table.CheckpointFolder(written)) == config
    assert emu_format.is_instruct(config) and config.ids.image == 14
    other = config.__class__(config.decoder, ids=config.ids, has_tower=False)
    with pytest.raises(UserError, match="not of the published kind"):
        emu_format.write_config(other)


def layer_norm(x, tensors, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def eva(pixels, tensors):
    """The public code's forward_features of an image [3, 8, 8], by NumPy; 2 heads, patches of 4 pixels."""
    t = tensors
    kernel = t["visual.patch_embed.proj.weight"]
    patches = [pixels[:, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
    bias = t["visual.patch_embed.proj.bias"]
    x = np.stack([(kernel * patch[None]).sum((1, 2, 3)) + bias for patch in patches])
    x = np.concatenate([t["visual.cls_token"][0], x]) + t["visual.pos_embed"][0]
    for i in range(2):
        name = f"visual.blocks.{i}."
        y = layer_norm(x, t, f"{name}norm1")
        zero = np.zeros(12, np.float32)
        biases = np.concatenate([t[f"{name}attn.q_bias"], zero, t[f"{name}attn.v_bias"]])
        qkv = (y @ t[f"{name}attn.qkv.weight"].T + biases).reshape(5, 3, 2, 6)
        q, k, v = qkv.transpose(1, 2, 0, 3)
        scores = q @ k.transpose(0, 2, 1) * 6**-0.5
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        read = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(5, 12)
        x = x + read @ t[f"{name}attn.proj.weight"].T + t[f"{name}attn.proj.bias"]
        y = layer_norm(x, t, f"{name}norm2")
        y = y @ t[f"{name}mlp.fc1.weight"].T + t[f"{name}mlp.fc1.bias"]
        y = np.asarray(jax.nn.gelu(y, approximate=False))
        x = x + y @ t[f"{name}mlp.fc2.weight"].T + t[f"{name}mlp.fc2.bias"]
    return x


def test_the_tower_computes_what_the_public_code_does(tmp_path):
    config = tiny_emu_folder.make_config()
    tensors = tiny_emu_folder.make_tensors(config)
    specs = shards.open_folder(epath.Path(tiny_emu_folder.write(tmp_path / "a", config, tensors)))
    family = emu_format.FAMILY
    made = family.read_config(table.CheckpointFolder(config))
    graphdef, abstract = family.describe(made)
    params = weights.load_shards(weights.check_tensors(family, made, specs), specs, abstract)
    images = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
    see = jax.jit(lambda p, x: nnx.merge(graphdef, p).see(x))
    found = see(params, images)
    mean, std = (np.float32(each) for each in (clip.IMAGE_MEAN, clip.IMAGE_STD))
    expected = [eva(((image - mean) / std).transpose(2, 0, 1), tensors) for image in images]
    np.testing.assert_allclose(found, np.stack(expected), atol=2e-5)


@pytest.mark.parametrize("is_instruct", [False, True])
def test_base_and_instruct_weights_are_not_confused(tmp_path, is_instruct):
    theirs, other = (tiny_emu_folder.make_config(each) for each in (is_instruct, not is_instruct))
    tensors = tiny_emu_folder.make_tensors(theirs)
    folder = tiny_emu_folder.write(tmp_path / "a", other, tensors)
    kinds = ("instruct", "base") if is_instruct else ("base", "instruct")
    with pytest.raises(
        UserError, match=f"weights of Emu's {kinds[0]} model.*describes the {kinds[1]}"
    ):
        importing.open_checkpoint("emu", folder)


def test_what_else_is_refused(tmp_path):
    config = tiny_emu_folder.make_config()
    tensors = tiny_emu_folder.make_tensors(config)
    lora = {"decoder.lm.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"}
    extra = tensors | dict.fromkeys(lora, np.zeros((2, 16), np.float32))
    with pytest.raises(UserError, match="LoRA weights .* merge them"):
        importing.open_checkpoint("emu", tiny_emu_folder.write(tmp_path / "a", config, extra))
    less = {k: v for k, v in tensors.items() if k != "decoder.lm.stu_regress_head.weight"}
    with pytest.raises(UserError, match=re.escape("lacks decoder.lm.stu_regress_head.weight")):
        importing.open_checkpoint("emu", tiny_emu_folder.write(tmp_path / "b", config, less))
    with pytest.raises(UserError, match="decoder is missing"):
        emu_format.read_config(table.CheckpointFolder(config | {"decoder": None}))
    for claims, size in ((False, 32_006), (True, 32_004)):
        said = config | {"instruct": claims, "decoder": config["decoder"] | {"vocab_size": size}}
        with pytest.raises(UserError, match=f"instruct={claims}, but its vocabulary"):
            emu_format.read_config(table.CheckpointFolder(said))
    rope = config["vision_cfg"] | {"rope": True}
    with pytest.raises(UserError, match="rope is True"):
        emu_format.read_config(table.CheckpointFolder(config | {"vision_cfg": rope}))
