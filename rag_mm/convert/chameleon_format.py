"""Hugging Face checkpoints of Chameleon (`model_type` chameleon): decoder, vocabulary map, image tokenizer.

Public checkpoints hold only the encoder and the codebook of the image tokenizer. Its decoder's tensors
are read if present, under the VQGAN's names (`model.vqmodel.decoder.up.0...`, where up.0 is the finest grid).
"""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from rag_mm.convert import image_processor, llama_format, vqgan_format
from rag_mm.convert.table import CheckpointFolder, ConfigReader, Family, Rule, Specs
from rag_mm.core.errors import UserError
from rag_mm.models import chameleon, vqgan

_VQ = "model.vqmodel."
# The defaults of transformers' ChameleonImageProcessor; 1 is Pillow's number of the Lanczos filter.
_PROCESSOR = image_processor.ImageProcessor(
    "ChameleonImageProcessor", 1, 0.0078, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)
)
_LAYER = "model.layers.{}.self_attn."


def read_config(checkpoint: CheckpointFolder) -> chameleon.ChameleonConfig:
    """The model that a config.json describes.

    Raises:
        UserError: a setting is missing, or our model does not support it.
    """
    v = ConfigReader(checkpoint.config, "config.json")
    decoder = llama_format.read_decoder(
        checkpoint,
        default_eps=1e-5,
        qk_norm=True,
        qk_norm_kind="layernorm_per_head",
        post_norm=v.get("swin_norm", bool, False),
    )
    vocabulary_map = vqgan_format.read_vocabulary_map(checkpoint.config)
    vq = read_vq(checkpoint, checkpoint.config.get("vq_config") or {}, _VQ)
    try:
        return chameleon.ChameleonConfig(
            decoder, vq, chameleon.parse_vocabulary_map(vocabulary_map)
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}.") from None


def read_vq(
    checkpoint: CheckpointFolder, values: Mapping[str, Any], prefix: str
) -> vqgan.VQGANConfig:
    """The image tokenizer that a vq_config describes; its tensors' names begin with `prefix`.

    Raises:
        UserError: our model does not support a setting of it or of the image processor.
    """
    v = ConfigReader(values, "config.json: vq_config")
    v.require("attn_type", "vanilla", "vanilla")
    image_size = v.get("resolution", int, 512)
    processor = image_processor.read(checkpoint, _PROCESSOR, image_size)
    if processor.mean != processor.std or set(processor.mean) != {1.0}:
        raise UserError(
            f"{checkpoint.preprocessor_file}: images are normalized by mean {list(processor.mean)} and std "
            f"{list(processor.std)}; this converter supports 1."
        )
    return vqgan_format.read_config(
        v,
        vqgan.VQGANConfig(),
        image_size=image_size,
        attention_sizes=vqgan_format.read_integers(v, "attn_resolutions", ()),
        gain=255 * processor.factor,
        has_decoder=any(name.startswith(f"{prefix}decoder.") for name in checkpoint.specs),
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
    return name_rules + vqgan_format.rules(config.vq, "vq/", _VQ)


def _is_ignored(config: chameleon.ChameleonConfig, name: str) -> bool:
    return llama_format.is_ignored(config.decoder, name)


def _rename(config: chameleon.ChameleonConfig, specs: Specs) -> Specs:
    return llama_format.rename(config.decoder, specs)


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
    _rename,
)
