"""Chameleon checkpoints of Hugging Face (`model_type` chameleon): decoder, vocabulary map, image tokenizer.

The public ones hold the image tokenizer's encoder and codebook only. Where a decoder's tensors are present,
under the names of the VQGAN that it is (`model.vqmodel.decoder.up.0...`, up 0 being the finest grid), they
are read too.
"""

from typing import Any

from flax import nnx

from rag_mm.convert import llama_format
from rag_mm.convert.table import CheckpointFolder, Convolution, Family, Matrix, Reader, Rule
from rag_mm.core.errors import UserError
from rag_mm.models import chameleon, chameleon_vq

_VQ = "model.vqmodel."
_RESCALE = 0.0078
_POINT = Matrix(tail=(1, 1))
_LAYER = "model.layers.{}.self_attn."


def read_config(outside: CheckpointFolder) -> chameleon.ChameleonConfig:
    """The model that a config.json describes.

    Raises:
        UserError: a setting is missing, or asks for something that the model does not compute.
    """
    values = outside.config
    v = Reader(values, "config.json")
    decoder = llama_format.read_decoder(
        values,
        default_eps=1e-5,
        qk_norm=True,
        qk_norm_kind="layernorm_per_head",
        post_norm=v.get("swin_norm", bool, False),
    )
    words = v.get("vocabulary_map", dict)
    try:
        return chameleon.ChameleonConfig(
            decoder, _read_vq(outside), chameleon.read_code_tokens(words)
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}.") from None


def _read_vq(outside: CheckpointFolder) -> chameleon_vq.ChameleonVQConfig:
    v = Reader(outside.config.get("vq_config") or {}, "config.json: vq_config")
    v.require("attn_type", "vanilla", "vanilla")
    v.require("double_latent", False, False)
    v.require("in_channels", 3, 3)
    p = Reader(outside.preprocessor, "preprocessor_config.json")
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
        has_decoder=any(name.startswith(f"{_VQ}decoder.") for name in outside.names),
    )


def write_config(config: chameleon.ChameleonConfig) -> dict[str, Any]:
    """The config.json of a Chameleon; raises UserError where the decoder is none."""
    d, vq = config.decoder, config.vq
    fixed = dict(qk_norm=True, qk_norm_kind="layernorm_per_head")
    llama_format.check_family(d, "Chameleon", **fixed)
    table = llama_format.write_decoder(d)
    del table["head_dim"]  # There it is hidden_size / num_attention_heads, always.
    if d.block.head_dim * d.num_heads != d.embed_dim:
        raise UserError(f"Chameleon has no heads of {d.block.head_dim} in {d.embed_dim}.")
    return table | {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "swin_norm": d.post_norm,
        "vocabulary_map": chameleon.write_code_tokens(config.code_tokens),
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
    """LLaMA's table with the norms of q and k, and the image tokenizer's."""
    found = llama_format.rules(config.decoder, prefix="decoder/")
    blocks = "decoder/stack/blocks/attention/"
    for name in ("q_norm", "k_norm"):
        found.append(Rule(f"{blocks}{name}/scale", f"{_LAYER}{name}.weight"))
        found.append(Rule(f"{blocks}{name}/bias", f"{_LAYER}{name}.bias"))
    num = len(config.vq.width_multipliers)
    found.append(Rule("vq/codebook/embedding", f"{_VQ}quantize.embedding.weight"))
    found += _point("vq/to_embedding", f"{_VQ}quant_conv")
    found += _point("vq/from_embedding", f"{_VQ}post_quant_conv")
    found += _half(
        "vq/encoder", f"{_VQ}encoder", "to_latent", "down", list(range(num)), "downsample"
    )
    coarse_first = list(reversed(range(num)))
    found += _half("vq/decoder", f"{_VQ}decoder", "to_pixels", "up", coarse_first, "upsample")
    return found


def _half(
    ours: str, theirs: str, last: str, scales: str, order: list[int], change: str
) -> list[Rule]:
    """Encoder or decoder: `order` gives their number of each of our scales."""
    found = [
        *_conv(f"{ours}/stem", f"{theirs}.conv_in"),
        *_norm(f"{ours}/norm", f"{theirs}.norm_out"),
        *_conv(f"{ours}/{last}", f"{theirs}.conv_out"),
        *_block(f"{ours}/middle/block1", f"{theirs}.mid.block_1"),
        *_attention(f"{ours}/middle/attention", f"{theirs}.mid.attn_1"),
        *_block(f"{ours}/middle/block2", f"{theirs}.mid.block_2"),
    ]
    for scale, number in enumerate(order):
        here, there = f"{ours}/scales/{scale}", f"{theirs}.{scales}.{number}"
        found += _conv(f"{here}/change", f"{there}.{change}.conv")
        for block in range(_MAX_BLOCKS):
            found += _block(f"{here}/blocks/{block}", f"{there}.block.{block}")
            found += _attention(f"{here}/attentions/{block}", f"{there}.attn.{block}")
    return found


_MAX_BLOCKS = 16  # Rules without a parameter are never asked for.


def _block(ours: str, theirs: str) -> list[Rule]:
    return [
        *_norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *_conv(f"{ours}/conv1", f"{theirs}.conv1"),
        *_norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *_conv(f"{ours}/conv2", f"{theirs}.conv2"),
        *_point(f"{ours}/skip", f"{theirs}.nin_shortcut"),
    ]


def _attention(ours: str, theirs: str) -> list[Rule]:
    found = _norm(f"{ours}/norm", f"{theirs}.norm")
    for here, there in {"q": "q", "k": "k", "v": "v", "out": "proj_out"}.items():
        found += _point(f"{ours}/{here}", f"{theirs}.{there}")
    return found


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")]


def _conv(ours: str, theirs: str) -> list[Rule]:
    weight = Rule(f"{ours}/kernel", f"{theirs}.weight", Convolution())
    return [weight, Rule(f"{ours}/bias", f"{theirs}.bias")]


def _point(ours: str, theirs: str) -> list[Rule]:
    weight = Rule(f"{ours}/kernel", f"{theirs}.weight", _POINT)
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
