"""Hugging Face checkpoints of Chameleon (`model_type` chameleon): decoder, vocabulary map, image tokenizer.

Public checkpoints hold only the encoder and the codebook of the image tokenizer. Its decoder's tensors
are read if present, under the VQGAN's names (`model.vqmodel.decoder.up.0...`, where up.0 is the finest grid).
"""

from typing import Any

from flax import nnx

from rag_mm.convert import llama_format
from rag_mm.convert.table import (
    CheckpointFolder,
    ConfigReader,
    ConvKernel,
    Family,
    LinearKernel,
    Rule,
)
from rag_mm.core.errors import UserError
from rag_mm.models import chameleon, chameleon_vq

_VQ = "model.vqmodel."
_RESCALE = 0.0078
_CONV1X1 = LinearKernel(tail=(1, 1))
_LAYER = "model.layers.{}.self_attn."


def read_config(checkpoint: CheckpointFolder) -> chameleon.ChameleonConfig:
    """The model that a config.json describes.

    Raises:
        UserError: a setting is missing, or our model does not support it.
    """
    values = checkpoint.config
    v = ConfigReader(values, "config.json")
    decoder = llama_format.read_decoder(
        values,
        default_eps=1e-5,
        qk_norm=True,
        qk_norm_kind="layernorm_per_head",
        post_norm=v.get("swin_norm", bool, False),
    )
    vocabulary_map = v.get("vocabulary_map", dict)
    try:
        return chameleon.ChameleonConfig(
            decoder, _read_vq(checkpoint), chameleon.parse_vocabulary_map(vocabulary_map)
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}.") from None


def _read_vq(checkpoint: CheckpointFolder) -> chameleon_vq.ChameleonVQConfig:
    v = ConfigReader(checkpoint.config.get("vq_config") or {}, "config.json: vq_config")
    v.require("attn_type", "vanilla", "vanilla")
    v.require("double_latent", False, False)
    v.require("in_channels", 3, 3)
    p = ConfigReader(checkpoint.preprocessor, "preprocessor_config.json")
    for key in ("image_mean", "image_std"):
        p.require(key, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    return chameleon_vq.ChameleonVQConfig(
        image_size=v.get("resolution", int, 512),
        width=v.get("base_channels", int, 128),
        width_multipliers=tuple(v.get("channel_multiplier", list, [1, 1, 2, 2, 4])),
        num_res_blocks=v.get("num_res_blocks", int, 2),
        attention_sizes=tuple(v.get("attn_resolutions", list, [])),
        latent_dim=v.get("latent_channels", int, 256),
        embed_dim=v.get("embed_dim", int, 256),
        codebook_size=v.get("num_embeddings", int, 8192),
        gain=255 * p.get("rescale_factor", float, _RESCALE),
        has_decoder=any(name.startswith(f"{_VQ}decoder.") for name in checkpoint.names),
    )


def write_config(config: chameleon.ChameleonConfig) -> dict[str, Any]:
    """The config.json of a Chameleon.

    Raises:
        UserError: the decoder has settings that Chameleon's does not.
    """
    d, vq = config.decoder, config.vq
    fixed = dict(qk_norm=True, qk_norm_kind="layernorm_per_head")
    llama_format.check_family(d, "Chameleon", **fixed)
    table = llama_format.write_decoder(d)
    del table["head_dim"]  # Chameleon's is always hidden_size / num_attention_heads.
    if d.block.head_dim * d.num_heads != d.embed_dim:
        raise UserError(
            f"Chameleon's head_dim is embed_dim / num_heads = {d.embed_dim / d.num_heads:g}, not "
            f"{d.block.head_dim}."
        )
    return table | {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "swin_norm": d.post_norm,
        "vocabulary_map": chameleon.make_vocabulary_map(config.code_tokens),
        "vq_config": {
            "model_type": "chameleon_vqgan",
            "resolution": vq.image_size,
            "base_channels": vq.width,
            "channel_multiplier": list(vq.width_multipliers),
            "num_res_blocks": vq.num_res_blocks,
            "attn_resolutions": list(vq.attention_sizes) or None,
            "latent_channels": vq.latent_dim,
            "embed_dim": vq.embed_dim,
            "num_embeddings": vq.codebook_size,
        },
    }


def rules(config: chameleon.ChameleonConfig) -> list[Rule]:
    """LLaMA's name table, the norms of q and k, and the image tokenizer."""
    name_rules = llama_format.rules(config.decoder, prefix="decoder/")
    blocks = "decoder/stack/blocks/attention/"
    for name in ("q_norm", "k_norm"):
        name_rules.append(Rule(f"{blocks}{name}/scale", f"{_LAYER}{name}.weight"))
        name_rules.append(Rule(f"{blocks}{name}/bias", f"{_LAYER}{name}.bias"))
    num_scales = len(config.vq.width_multipliers)
    name_rules.append(Rule("vq/codebook/embedding", f"{_VQ}quantize.embedding.weight"))
    name_rules += _conv1x1("vq/to_embedding", f"{_VQ}quant_conv")
    name_rules += _conv1x1("vq/from_embedding", f"{_VQ}post_quant_conv")
    name_rules += _coder_rules(
        "vq/encoder", f"{_VQ}encoder", "to_latent", "down", list(range(num_scales)), "downsample"
    )
    coarse_first = list(reversed(range(num_scales)))
    name_rules += _coder_rules(
        "vq/decoder", f"{_VQ}decoder", "to_pixels", "up", coarse_first, "upsample"
    )
    return name_rules


def _coder_rules(
    ours: str, theirs: str, last: str, scales: str, order: list[int], change: str
) -> list[Rule]:
    """Encoder or decoder of the image tokenizer; `order` is their index of each of our scales."""
    name_rules = [
        *_conv(f"{ours}/stem", f"{theirs}.conv_in"),
        *_norm(f"{ours}/norm", f"{theirs}.norm_out"),
        *_conv(f"{ours}/{last}", f"{theirs}.conv_out"),
        *_block(f"{ours}/middle/block1", f"{theirs}.mid.block_1"),
        *_attention(f"{ours}/middle/attention", f"{theirs}.mid.attn_1"),
        *_block(f"{ours}/middle/block2", f"{theirs}.mid.block_2"),
    ]
    for scale, their_scale in enumerate(order):
        here, there = f"{ours}/scales/{scale}", f"{theirs}.{scales}.{their_scale}"
        name_rules += _conv(f"{here}/change", f"{there}.{change}.conv")
        for block in range(_MAX_BLOCKS):
            name_rules += _block(f"{here}/blocks/{block}", f"{there}.block.{block}")
            name_rules += _attention(f"{here}/attentions/{block}", f"{there}.attn.{block}")
    return name_rules


_MAX_BLOCKS = 16  # Rules without a parameter are ignored.


def _block(ours: str, theirs: str) -> list[Rule]:
    return [
        *_norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *_conv(f"{ours}/conv1", f"{theirs}.conv1"),
        *_norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *_conv(f"{ours}/conv2", f"{theirs}.conv2"),
        *_conv1x1(f"{ours}/skip", f"{theirs}.nin_shortcut"),
    ]


def _attention(ours: str, theirs: str) -> list[Rule]:
    name_rules = _norm(f"{ours}/norm", f"{theirs}.norm")
    for here, there in {"q": "q", "k": "k", "v": "v", "out": "proj_out"}.items():
        name_rules += _conv1x1(f"{ours}/{here}", f"{theirs}.{there}")
    return name_rules


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")]


def _conv(ours: str, theirs: str) -> list[Rule]:
    weight = Rule(f"{ours}/kernel", f"{theirs}.weight", ConvKernel())
    return [weight, Rule(f"{ours}/bias", f"{theirs}.bias")]


def _conv1x1(ours: str, theirs: str) -> list[Rule]:
    weight = Rule(f"{ours}/kernel", f"{theirs}.weight", _CONV1X1)
    return [weight, Rule(f"{ours}/bias", f"{theirs}.bias")]


def _is_ignored(config: chameleon.ChameleonConfig, name: str) -> bool:
    return llama_format.is_ignored(config.decoder, name)


def _make_model(config: chameleon.ChameleonConfig) -> nnx.Module:
    return chameleon.Chameleon(config, rngs=nnx.Rngs(params=0))


FAMILY = Family(
    "chameleon",
    chameleon.ChameleonConfig,
    read_config,
    write_config,
    _make_model,
    rules,
    _is_ignored,
)
