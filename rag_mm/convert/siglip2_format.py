"""Hugging Face checkpoints of SigLIP 2: config and name table.

Models of one image size have the `model_type` siglip, as SigLIP 1, whose tensors are the same; NaFlex models,
which take any aspect ratio, have siglip2.
"""

import math
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
    Transform,
)
from rag_mm.core.errors import UserError
from rag_mm.models import siglip2
from rag_mm.models.clip import TowerConfig

ONE_SIZE, ANY_ASPECT = "siglip", "siglip2"
_ACTIVATION = "gelu_pytorch_tanh"
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
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers.


def read_config(checkpoint: CheckpointFolder) -> siglip2.SigLIP2Config:
    """The model that a config.json and the settings of its image processor describe; padding is 0.

    Raises:
        UserError: a setting is missing, or our model does not support it.
    """
    values = checkpoint.config
    top = ConfigReader(values, "config.json")
    any_aspect = top.require("model_type", ONE_SIZE, ONE_SIZE, ANY_ASPECT) == ANY_ASPECT
    vision, text = (
        ConfigReader(values.get(f"{side}_config") or {}, f"config.json: {side}_config")
        for side in ("vision", "text")
    )
    for tower in (vision, text):
        tower.require("hidden_act", _ACTIVATION, _ACTIVATION)
    eps = vision.get("layer_norm_eps", float, 1e-6, low=0, high=1)
    text.require("layer_norm_eps", 1e-6, eps)
    vision.require("num_channels", 3, 3)
    vision.require("vision_use_head", True, True)
    towers = [_read_tower(tower) for tower in (vision, text)]
    text.require("projection_size", towers[1].embed_dim, towers[0].embed_dim)
    patch = vision.get("patch_size", int, 16, low=1)
    if any_aspect:
        grid = math.isqrt(vision.get("num_patches", int, 256, low=1))
        vision.require("num_patches", 256, grid * grid)
        image_size = grid * patch
    else:
        image_size = vision.get("image_size", int, 224)
    resample, (mean, std) = _read_processor(checkpoint, image_size, patch, any_aspect)
    try:
        return siglip2.SigLIP2Config(
            image_size=image_size,
            patch_size=patch,
            vision=towers[0],
            text=towers[1],
            vocab_size=text.get("vocab_size", int, 32_000),
            max_text_len=text.get("max_position_embeddings", int, 64),
            any_aspect=any_aspect,
            resample=resample,
            image_mean=mean,
            image_std=std,
            norm_eps=eps,
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}.") from None


def _read_tower(r: ConfigReader) -> TowerConfig:
    try:
        return TowerConfig(
            embed_dim=r.get("hidden_size", int, 768),
            num_layers=r.get("num_hidden_layers", int, 12, low=1, high=MAX_LAYERS),
            num_heads=r.get("num_attention_heads", int, 12, low=1),
            mlp_dim=r.get("intermediate_size", int, 3072),
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}.") from None


def _read_processor(
    checkpoint: CheckpointFolder, size: int, patch: int, any_aspect: bool
) -> tuple[str, tuple[image_processor.Channels, image_processor.Channels]]:
    """The filter, and mean and standard deviation of pixels in 0..1, of the image processor.

    Without settings they are those of transformers' classes.
    """
    r = ConfigReader(checkpoint.preprocessor, checkpoint.preprocessor_file)
    name = "Siglip2ImageProcessor" if any_aspect else "SiglipImageProcessor"
    number = r.require("resample", 2 if any_aspect else 3, *_FILTERS)
    if any_aspect:
        r.require("patch_size", patch, patch)
        r.require("max_num_patches", (size // patch) ** 2, (size // patch) ** 2)
    else:
        square = {"height": size, "width": size}
        r.require("size", square, square, size)
        r.require("do_center_crop", False, False)
    defaults = image_processor.ImageProcessor(name, number, 1 / 255, siglip2.HALF, siglip2.HALF)
    return _FILTERS[number], image_processor.read_scaling(checkpoint, defaults).of_unit_range


def write_config(config: siglip2.SigLIP2Config) -> dict[str, Any]:
    """The config.json of a SigLIP 2."""
    c, name = config, ANY_ASPECT if config.any_aspect else ONE_SIZE
    size = {"num_patches": c.grid**2} if c.any_aspect else {"image_size": c.image_size}
    shared = {"hidden_act": _ACTIVATION, "layer_norm_eps": c.norm_eps}
    return {
        "architectures": ["Siglip2Model" if c.any_aspect else "SiglipModel"],
        "model_type": name,
        "vision_config": _write_tower(c.vision)
        | shared
        | size
        | {"patch_size": c.patch_size, "model_type": f"{name}_vision_model"},
        "text_config": _write_tower(c.text)
        | shared
        | {
            "vocab_size": c.vocab_size,
            "max_position_embeddings": c.max_text_len,
            "projection_size": c.projection_dim,
            "pad_token_id": c.padding,
            "model_type": f"{name}_text_model",
        },
    }


def _write_tower(tower: TowerConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.embed_dim,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "intermediate_size": tower.mlp_dim,
    }


def write_preprocessor(config: siglip2.SigLIP2Config) -> dict[str, Any]:
    """The preprocessor_config.json of a SigLIP 2."""
    c = config
    how = {
        "resample": next(number for number, name in _FILTERS.items() if name == c.resample),
        "image_mean": list(c.image_mean),
        "image_std": list(c.image_std),
    }
    if c.any_aspect:
        return how | {
            "image_processor_type": "Siglip2ImageProcessor",
            "patch_size": c.patch_size,
            "max_num_patches": c.grid**2,
        }
    square = {"height": c.image_size, "width": c.image_size}
    return how | {"image_processor_type": "SiglipImageProcessor", "size": square}


def rules(config: siglip2.SigLIP2Config) -> list[Rule]:
    """The name table."""
    vision, text, head = "vision_model.", "text_model.", "vision_model.head."
    # A matrix over flat patches, or a convolution.
    patches: Transform = LinearKernel() if config.any_aspect else PatchEmbedding(config.patch_size)
    found = [
        Rule("vision/patches/kernel", f"{vision}embeddings.patch_embedding.weight", patches),
        Rule("vision/patches/bias", f"{vision}embeddings.patch_embedding.bias"),
        Rule("vision/position_embedding", f"{vision}embeddings.position_embedding.weight"),
        *_norm("vision/post_norm", f"{vision}post_layernorm"),
        Rule("vision/head/query", f"{head}probe"),
        Rule("vision/head/qkv/kernel", f"{head}attention.in_proj_weight", LinearKernel()),
        Rule("vision/head/qkv/bias", f"{head}attention.in_proj_bias", Reshape(1)),
        *_linear("vision/head/out", f"{head}attention.out_proj", 2),
        *_norm("vision/head/norm", f"{head}layernorm"),
        *_linear("vision/head/mlp/up", f"{head}mlp.fc1"),
        *_linear("vision/head/mlp/down", f"{head}mlp.fc2"),
        Rule("text/embedding/table", f"{text}embeddings.token_embedding.weight"),
        Rule("text/position_embedding", f"{text}embeddings.position_embedding.weight"),
        *_norm("text/norm", f"{text}final_layer_norm"),
        *_linear("text/head", f"{text}head"),
        Rule("logit_scale", "logit_scale"),
        Rule("logit_bias", "logit_bias"),
    ]
    for side, theirs in (("vision", vision), ("text", text)):
        blocks = f"{side}/stack/blocks/"
        for ours, name in _NORMS.items():
            found += _norm(f"{blocks}{ours}", f"{theirs}{_LAYER}{name}")
        for ours, (name, num_in) in _MODULES.items():
            found += _linear(f"{blocks}{ours}", f"{theirs}{_LAYER}{name}", num_in)
    return found


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")]


def _linear(ours: str, theirs: str, num_in: int = 1) -> list[Rule]:
    return [
        Rule(f"{ours}/kernel", f"{theirs}.weight", LinearKernel(num_in)),
        Rule(f"{ours}/bias", f"{theirs}.bias", Reshape(1)),
    ]


def _make_model(config: siglip2.SigLIP2Config) -> nnx.Module:
    return siglip2.SigLIP2(config, rngs=nnx.Rngs(0))


def _is_ignored(config: siglip2.SigLIP2Config, name: str) -> bool:
    del config
    return name in _BUFFERS


FAMILY = Family(
    "siglip2",
    siglip2.SigLIP2Config,
    read_config,
    write_config,
    _make_model,
    rules,
    _is_ignored,
    model_types=(ONE_SIZE, ANY_ASPECT),
)
