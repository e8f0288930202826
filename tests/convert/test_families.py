"""Configs of external families: reading, writing back, and rejection of unsupported settings by name."""

import jax
import pytest
import tiny

from rag_mm.api import importing
from rag_mm.convert import llama_format, table
from rag_mm.core.errors import UserError
from rag_mm.models import chameleon, clip, llama
from rag_mm.nn import param_trees
from rag_mm.nn.decoder import DecoderConfig
from rag_mm.ops import rope


def read(name, **change):
    family, values = tiny.CHECKPOINTS[name]
    return importing.FAMILIES[family].read_config(table.CheckpointFolder(values | change))


@pytest.mark.parametrize("name", tiny.CHECKPOINTS)
def test_reading_a_written_config_restores_it(name):
    family = importing.FAMILIES[tiny.CHECKPOINTS[name][0]]
    config = read(name)
    assert family.read_config(table.CheckpointFolder(family.write_config(config))) == config


def test_settings_from_before_transformers_5_are_equivalent():
    now = read("llama_3")
    scaling = dict(tiny.CHECKPOINTS["llama_3"][1]["rope_parameters"])
    theta = scaling.pop("rope_theta")
    old = read("llama_3", rope_parameters=None, rope_theta=theta, rope_scaling=scaling)
    older = dict(scaling, type=scaling.pop("rope_type"))
    assert old == read("llama_3", rope_parameters=None, rope_theta=theta, rope_scaling=older) == now
    assert now.rope_scaling == rope.Llama3Scaling(8.0, 1.0, 4.0, 16)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("llama", dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
        ("llama", dict(mlp_bias="yes"), "mlp_bias is 'yes'"),
        ("llama", dict(rope_parameters={"rope_type": "yarn"}), "rope_type is 'yarn'"),
        ("llama", dict(rope_parameters={"rope_type": "llama3"}), "factor is missing"),
        ("llama", dict(hidden_size=None), "hidden_size is missing"),
        ("llama", dict(hidden_size="32"), "hidden_size is '32'"),
        ("llama", dict(num_hidden_layers=0), "num_hidden_layers is 0; give 1 to 4,096"),
        ("llama", dict(num_attention_heads=0), "num_attention_heads is 0"),
        ("llama", dict(num_key_value_heads=3), "3 key heads do not divide 4 heads"),
        (
            "llama",
            dict(rope_parameters=tiny.LLAMA3 | dict(factor=0)),
            "rope scaling needs factor > 0",
        ),
        ("chameleon", dict(vocabulary_map=None), "vocabulary_map is missing"),
        ("chameleon", dict(vocabulary_map={"IMGIMGBZ": 3}), "do not number the codes"),
        ("chameleon", dict(vocabulary_map={"IMGIMG-Z": 3}), "not a valid image token name"),
        ("chameleon", dict(vocabulary_map={"IMGIMGAZ": 3}), "1 image tokens for 16 codes"),
        ("chameleon", dict(vocab_size=20), "outside the vocabulary of 20 tokens"),
        ("clip", dict(vision_config={"hidden_act": "relu"}), "hidden_act is 'relu'"),
        ("clip", dict(vision_config={"patch_size": [4, 4]}), r"patch_size is \[4, 4\]"),
        ("clip", dict(text_config={"hidden_act": "gelu"}), "hidden_act is 'gelu'"),
        ("clip", dict(text_config="text"), "is not a JSON object"),
    ],
)
def test_unsupported_settings_are_rejected_by_name(name, change, reason):
    with pytest.raises(UserError, match=reason):
        read(name, **change)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (dict(smear_lags=((1,),)), "smear_lags"),
        (dict(qk_norm=True), "qk_norm"),
        (dict(post_norm=True), "post_norm"),
        (dict(norm="layernorm"), "norm"),
        (dict(positions="learned"), "positions"),
        (dict(mlp="gelu"), "mlp"),
        (dict(scale_embeddings=True), "scale_embeddings"),
    ],
)
def test_a_decoder_that_is_not_a_llama_names_the_difference(change, name):
    config = DecoderConfig(10, 1, 8, 2, 16, 8, **change)
    with pytest.raises(UserError, match=f"not a LLaMA: its {name} is"):
        llama_format.write_config(config)


def count(family, config):
    return sum(
        leaf.size for leaf in jax.tree.leaves(importing.FAMILIES[family].describe(config)[1])
    )


@pytest.mark.parametrize(
    ("family", "config", "parameters"),
    [
        ("llama", llama.llama_7b(), 6_738_415_616),
        ("llama", llama.llama_13b(), 13_015_864_320),
        ("clip", clip.CLIPConfig.b32(), 151_277_313),
        ("clip", clip.CLIPConfig.l14(), 427_616_513),
        ("clip", clip.CLIPConfig.l14_336(), 427_944_193),
    ],
    ids=["llama_7b", "llama_13b", "clip_b32", "clip_l14", "clip_l14_336"],
)
def test_published_sizes(family, config, parameters):
    """Parameter counts, from abstract shapes, equal the published ones."""
    assert count(family, config) == parameters


def test_chameleon_7b_has_its_published_shapes():
    family, config = importing.FAMILIES["chameleon"], chameleon.ChameleonConfig.chameleon_7b()
    leaves = param_trees.leaves_by_path(family.describe(config)[1])
    decoder = sum(leaf.size for name, leaf in leaves.items() if name.startswith("decoder/"))
    # LLaMA-7B with 65,536 tokens, and per layer the scale and bias of 32 heads of 128, for q and k.
    assert decoder == 6_738_415_616 + 2 * (65_536 - 32_000) * 4096 + 32 * 4 * 4096
    assert leaves["decoder/stack/blocks/attention/q_norm/scale"].shape == (32, 32, 128)
    assert leaves["vq/codebook/embedding"].shape == (8192, 256)
    assert config.vq.num_codes == 1024
    assert not [name for name in leaves if name.startswith("vq/decoder")]
