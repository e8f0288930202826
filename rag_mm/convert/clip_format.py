"""Hugging Face checkpoints of CLIP (`model_type` clip): config and name table."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from rag_mm.convert import image_processor
from rag_mm.convert.table import (
    MAX_LAYERS,
    CheckpointFolder,
    ConfigReader,
    Family,
    LinearKernel,
    PatchEmbedding,
    Reshape,
    Rule,
)
from rag_mm.core.errors import UserError
from rag_mm.models import clip

_LAYER = "encoder.layers.{}."
_MODULES = {
    "attention/q": ("self_attn.q_proj", 1),
    "attention/k": ("self_attn.k_proj", 1),
    "attention/v": ("self_attn.v_proj", 1),
    "attention/out": ("self_attn.out_proj", 2),
    "mlp/up": ("mlp.fc1", 1),
    "mlp/down": ("mlp.fc2", 1),
}
_NORMS = {"attention_norm": "layer_norm1", "mlp_norm": "layer_norm2"}
_BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
# Configs before 2023 give this end-of-text id for any vocabulary; transformers then pools at the highest id.
_LEGACY_END = 2
# The defaults of transformers' CLIPImageProcessor; 3 is Pillow's number of the bicubic filter.
_PROCESSOR = image_processor.ImageProcessor(
    "CLIPImageProcessor", 3, 1 / 255, clip.IMAGE_MEAN, clip.IMAGE_STD
)


def read_config(checkpoint: CheckpointFolder) -> clip.CLIPConfig:
    """The model that a config.json and the settings of its image processor describe.

    Raises:
        UserError: a setting is missing, or our model does not support it.
    """
    values = checkpoint.config
    top = ConfigReader(values, "config.json")
    vision, text = (
        ConfigReader(_tower(values, side), f"config.json: {side}") for side in ("vision", "text")
    )
    mlp = vision.require("hidden_act", "quick_gelu", "quick_gelu", "gelu")
    text.require("hidden_act", "quick_gelu", mlp)
    eps = vision.get("layer_norm_eps", float, 1e-5, low=0, high=1)
    text.require("layer_norm_eps", 1e-5, eps)
    vision.require("num_channels", 3, 3)
    end = text.get("eos_token_id", int, 49_407)
    vocab_size = text.get("vocab_size", int, 49_408)
    is_legacy = end == _LEGACY_END
    image_size = vision.get("image_size", int, 224)
    mean, std = image_processor.read(checkpoint, _PROCESSOR, image_size).of_unit_range
    try:
        return clip.CLIPConfig(
            image_size=image_size,
            patch_size=vision.get("patch_size", int, 32),
            vision=_read_tower(vision, 768, 12, 12, 3072),
            text=_read_tower(text, 512, 12, 8, 2048),
            vocab_size=vocab_size,
            max_text_len=text.get("max_position_embeddings", int, 77),
            end_of_text=vocab_size - 1 if is_legacy else end,
            projection_dim=top.get("projection_dim", int, 512),
            mlp=mlp,
            image_mean=mean,
            image_std=std,
            pooling="highest_id" if is_legacy else "first_end",
            norm_eps=eps,
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}.") from None


def _tower(values: Mapping[str, Any], side: str) -> Any:
    # Old files repeat settings in `text_config_dict`, which take precedence.
    tables = [values.get(f"{side}_config") or {}, values.get(f"{side}_config_dict") or {}]
    invalid = [table for table in tables if not isinstance(table, Mapping)]
    return invalid[0] if invalid else {**tables[0], **tables[1]}


def _read_tower(
    r: ConfigReader, width: int, layers: int, heads: int, mlp_dim: int
) -> clip.TowerConfig:
    return clip.TowerConfig(
        embed_dim=r.get("hidden_size", int, width),
        num_layers=r.get("num_hidden_layers", int, layers, low=1, high=MAX_LAYERS),
        num_heads=r.get("num_attention_heads", int, heads),
        mlp_dim=r.get("intermediate_size", int, mlp_dim),
    )


def write_config(config: clip.CLIPConfig) -> dict[str, Any]:
    """The config.json of a CLIP.

    Raises:
        UserError: config.json cannot express its pooling.
    """
    c = config
    shared = {
        "hidden_act": c.mlp,
        "layer_norm_eps": c.norm_eps,
        "projection_dim": c.projection_dim,
    }
    # transformers pools at the highest id exactly if the config gives 2.
    end = _LEGACY_END if c.pooling == "highest_id" else c.end_of_text
    if c.pooling != "highest_id" and end == _LEGACY_END:
        raise UserError(
            "A CLIP whose end-of-text id is 2 would be read as one that pools at the highest id."
        )
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": c.projection_dim,
        "vision_config": _write_tower(c.vision)
        | shared
        | {
            "image_size": c.image_size,
            "patch_size": c.patch_size,
            "model_type": "clip_vision_model",
        },
        "text_config": _write_tower(c.text)
        | shared
        | {
            "vocab_size": c.vocab_size,
            "max_position_embeddings": c.max_text_len,
            "eos_token_id": end,
            "model_type": "clip_text_model",
        },
    }


def _write_tower(tower: clip.TowerConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.embed_dim,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "intermediate_size": tower.mlp_dim,
    }


def write_preprocessor(config: clip.CLIPConfig) -> dict[str, Any]:
    """The preprocessor_config.json of a CLIP."""
    side = config.image_size
    return {
        "image_processor_type": _PROCESSOR.name,
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


def rules(config: clip.CLIPConfig) -> list[Rule]:
    """The name table."""
    vision, text = "vision_model.", "text_model."
    name_rules = [
        Rule(
            "vision/patches/kernel",
            f"{vision}embeddings.patch_embedding.weight",
            PatchEmbedding(config.patch_size),
        ),
        Rule("vision/class_embedding", f"{vision}embeddings.class_embedding"),
        Rule("vision/position_embedding", f"{vision}embeddings.position_embedding.weight"),
        *_norm("vision/pre_norm", f"{vision}pre_layrnorm"),  # sic, in every checkpoint
        *_norm("vision/post_norm", f"{vision}post_layernorm"),
        Rule("text/embedding/table", f"{text}embeddings.token_embedding.weight"),
        Rule("text/position_embedding", f"{text}embeddings.position_embedding.weight"),
        *_norm("text/norm", f"{text}final_layer_norm"),
        Rule("image_projection", "visual_projection.weight", LinearKernel()),
        Rule("text_projection", "text_projection.weight", LinearKernel()),
        Rule("logit_scale", "logit_scale"),
    ]
    for side, theirs in (("vision", vision), ("text", text)):
        blocks = f"{side}/stack/blocks/"
        for ours, name in _NORMS.items():
            name_rules += _norm(f"{blocks}{ours}", f"{theirs}{_LAYER}{name}")
        for ours, (name, num_in) in _MODULES.items():
            module = f"{theirs}{_LAYER}{name}"
            name_rules.append(
                Rule(f"{blocks}{ours}/kernel", f"{module}.weight", LinearKernel(num_in))
            )
            name_rules.append(Rule(f"{blocks}{ours}/bias", f"{module}.bias", Reshape(1)))
    return name_rules


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")]


def _make_model(config: clip.CLIPConfig) -> nnx.Module:
    return clip.CLIP(config, rngs=nnx.Rngs(0))


def _is_ignored(config: clip.CLIPConfig, name: str) -> bool:
    del config
    return name in _BUFFERS


FAMILY = Family("clip", clip.CLIPConfig, read_config, write_config, _make_model, rules, _is_ignored)
