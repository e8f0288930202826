"""Stable Diffusion's U-Net and autoencoder as diffusers writes them: folders `unet` and `vae` of safetensors.

Their config.json has no `model_type` but a `_class_name`. A U-Net's `cross_attention_dim` is the width of its
condition: 768 for CLIP's texts, that of Emu's codes for Emu's visual decoder.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from etils import epath
from flax import nnx

from rag_mm.convert import shards, vqgan_format
from rag_mm.convert.shards import TensorSpec
from rag_mm.convert.table import CheckpointFolder, ConfigReader, Family, LinearKernel, Rule
from rag_mm.core import checks
from rag_mm.core.errors import UserError
from rag_mm.models.emu.latent_vae import LatentVAE, LatentVAEConfig
from rag_mm.models.emu.unet import UNet, UNetConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET_CLASS, VAE_CLASS = "UNet2DConditionModel", "AutoencoderKL"
_ATTENDS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
# Names of the autoencoder's attention before diffusers 0.12, in which Stable Diffusion 1.5 is published.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_MAX_BLOCKS = checks.MAX_BLOCKS + 1


def open_folder(folder: epath.Path) -> Mapping[str, TensorSpec]:
    """Tensors of a folder by name, from diffusers' one file or from files as `shards.open_folder` reads.

    Raises:
        UserError: as `shards.open_folder`.
    """
    path = folder / WEIGHTS
    return shards.read_header(path) if path.exists() else shards.open_folder(folder)


@dataclasses.dataclass(frozen=True)
class ImportedUNetConfig:
    """A U-Net with the width of its condition.

    Attributes:
        unet: its sizes.
        condition_dim: width of the vectors that it reads.
    """

    unet: UNetConfig
    condition_dim: int


def read_unet_config(checkpoint: CheckpointFolder) -> ImportedUNetConfig:
    """The U-Net that a config.json describes.

    Raises:
        UserError: a setting that our model does not support.
    """
    r = ConfigReader(checkpoint.config, "unet/config.json")
    r.require("_class_name", UNET_CLASS, UNET_CLASS)
    for name in ("center_input_sample", "use_linear_projection", "only_cross_attention"):
        r.require(name, False, False)
    for name in (
        "class_embed_type",
        "addition_embed_type",
        "encoder_hid_dim",
        "time_embedding_dim",
    ):
        r.require(name, None, None)
    r.require("resnet_time_scale_shift", "default", "default")
    r.require("flip_sin_to_cos", True, True)
    r.require("freq_shift", 0, 0)
    r.require("norm_eps", 1e-5, 1e-5)
    r.require("act_fn", "silu", "silu")
    r.require("mid_block_type", "UNetMidBlock2DCrossAttn", "UNetMidBlock2DCrossAttn")
    r.require("transformer_layers_per_block", 1, 1)
    channels = r.get("in_channels", int, 4)
    r.require("out_channels", 4, channels)
    down = _kinds(r, "down_block_types", _ATTENDS)
    if _kinds(r, "up_block_types", _UP) != down[::-1]:
        raise UserError("unet/config.json: up_block_types do not mirror down_block_types.")
    try:
        unet = UNetConfig(
            image_size=r.get("sample_size", int, 64),
            num_channels=channels,
            widths=vqgan_format.read_integers(r, "block_out_channels", (320, 640, 1280, 1280)),
            attends=down,
            num_res_blocks=r.get("layers_per_block", int, 2),
            # Published under this name, it is the number of heads.
            num_heads=r.get("attention_head_dim", int, 8),
            num_groups=r.get("norm_num_groups", int, 32),
        )
    except ValueError as error:
        raise UserError(f"unet/config.json: {error}.") from None
    return ImportedUNetConfig(unet, r.get("cross_attention_dim", int, low=1))


def write_unet_config(config: ImportedUNetConfig) -> dict[str, Any]:
    """The config.json of a U-Net."""
    u = config.unet
    name = {value: key for key, value in _ATTENDS.items()}
    up = {value: key for key, value in _UP.items()}
    return {
        "_class_name": UNET_CLASS,
        "sample_size": u.image_size,
        "in_channels": u.num_channels,
        "out_channels": u.num_channels,
        "block_out_channels": list(u.widths),
        "down_block_types": [name[each] for each in u.attends],
        "up_block_types": [up[each] for each in u.attends[::-1]],
        "layers_per_block": u.num_res_blocks,
        "attention_head_dim": u.num_heads,
        "norm_num_groups": u.num_groups,
        "cross_attention_dim": config.condition_dim,
    }


def read_vae_config(checkpoint: CheckpointFolder) -> LatentVAEConfig:
    """The autoencoder that a config.json describes; raises as `read_unet_config`."""
    r = ConfigReader(checkpoint.config, "vae/config.json")
    r.require("_class_name", VAE_CLASS, VAE_CLASS)
    for name in ("in_channels", "out_channels"):
        r.require(name, 3, 3)
    r.require("act_fn", "silu", "silu")
    for name in ("shift_factor", "latents_mean", "latents_std"):
        r.require(name, None, None)
    for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
        r.require(name, True, True)
    _kinds(r, "down_block_types", {"DownEncoderBlock2D": True})
    _kinds(r, "up_block_types", {"UpDecoderBlock2D": True})
    try:
        return LatentVAEConfig(
            image_size=r.get("sample_size", int, 512),
            widths=vqgan_format.read_integers(r, "block_out_channels", (128, 256, 512, 512)),
            num_res_blocks=r.get("layers_per_block", int, 2),
            latent_dim=r.get("latent_channels", int, 4),
            num_groups=r.get("norm_num_groups", int, 32),
            scale=r.get("scaling_factor", float, 0.18215),
        )
    except (ValueError, ArithmeticError) as error:
        raise UserError(f"vae/config.json: {error}.") from None


def write_vae_config(config: LatentVAEConfig) -> dict[str, Any]:
    """The config.json of an autoencoder."""
    c, num = config, len(config.widths)
    return {
        "_class_name": VAE_CLASS,
        "sample_size": c.image_size,
        "block_out_channels": list(c.widths),
        "down_block_types": ["DownEncoderBlock2D"] * num,
        "up_block_types": ["UpDecoderBlock2D"] * num,
        "layers_per_block": c.num_res_blocks,
        "latent_channels": c.latent_dim,
        "norm_num_groups": c.num_groups,
        "scaling_factor": c.scale,
    }


def unet_rules(config: ImportedUNetConfig) -> list[Rule]:
    """The name table of a U-Net. Rules without a parameter are ignored."""
    rules = [
        *_linear("step_in", "time_embedding.linear_1"),
        *_linear("step_out", "time_embedding.linear_2"),
        *vqgan_format.conv("stem", "conv_in"),
        *vqgan_format.norm("norm", "conv_norm_out"),
        *vqgan_format.conv("output", "conv_out"),
        *_transformer("middle_transformer", "mid_block.attentions.0"),
        *_block("middle/blocks/0", "mid_block.resnets.0"),
        *_block("middle/blocks/1", "mid_block.resnets.1"),
    ]
    for way in ("down", "up"):
        for grid in range(len(config.unet.widths)):
            ours, theirs = f"{way}/{grid}", f"{way}_blocks.{grid}"
            rules += vqgan_format.conv(f"{ours}/change", f"{theirs}.{way}samplers.0.conv")
            for index in range(_MAX_BLOCKS):
                rules += _block(f"{ours}/blocks/{index}", f"{theirs}.resnets.{index}")
                rules += _transformer(
                    f"{ours}/transformers/{index}", f"{theirs}.attentions.{index}"
                )
    return rules


def vae_rules(config: LatentVAEConfig) -> list[Rule]:
    """The name table of an autoencoder. Rules without a parameter are ignored."""
    rules = [
        *vqgan_format.conv1x1("to_moments", "quant_conv"),
        *vqgan_format.conv1x1("from_latent", "post_quant_conv"),
        *vqgan_format.conv("encoder/to_latent", "encoder.conv_out"),
        *vqgan_format.conv("decoder/to_pixels", "decoder.conv_out"),
    ]
    for coder, way in (("encoder", "down"), ("decoder", "up")):
        middle, theirs = f"{coder}/middle", f"{coder}.mid_block"
        rules += vqgan_format.conv(f"{coder}/stem", f"{coder}.conv_in")
        rules += vqgan_format.norm(f"{coder}/norm", f"{coder}.conv_norm_out")
        rules += _block(f"{middle}/block1", f"{theirs}.resnets.0")
        rules += _block(f"{middle}/block2", f"{theirs}.resnets.1")
        rules += vqgan_format.norm(f"{middle}/attention/norm", f"{theirs}.attentions.0.group_norm")
        for part, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0")):
            rules += _linear(f"{middle}/attention/{part}", f"{theirs}.attentions.0.{name}")
        for grid in range(len(config.widths)):
            ours, there = f"{coder}/scales/{grid}", f"{coder}.{way}_blocks.{grid}"
            rules += vqgan_format.conv(f"{ours}/change", f"{there}.{way}samplers.0.conv")
            for index in range(_MAX_BLOCKS):
                rules += _block(f"{ours}/blocks/{index}", f"{there}.resnets.{index}")
    return rules


def rename_vae(config: LatentVAEConfig, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Tensors under today's names of the attention's."""
    del config
    pattern = re.compile(rf"(\.attentions\.0)\.({'|'.join(OLD_NAMES)})\.")
    return {
        pattern.sub(lambda found: f"{found[1]}.{OLD_NAMES[found[2]]}.", name): spec
        for name, spec in specs.items()
    }


def _kinds(r: ConfigReader, key: str, known: Mapping[str, bool]) -> tuple[bool, ...]:
    names = r.get(key, (list, tuple))
    if len(names) > checks.MAX_BLOCKS or any(name not in known for name in names):
        raise UserError(f"{key} are {str(list(names))[:80]}; supported are {', '.join(known)}.")
    return tuple(known[name] for name in names)


def _block(ours: str, theirs: str) -> list[Rule]:
    return [
        *vqgan_format.norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *vqgan_format.conv(f"{ours}/conv1", f"{theirs}.conv1"),
        *_linear(f"{ours}/step", f"{theirs}.time_emb_proj"),
        *vqgan_format.norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *vqgan_format.conv(f"{ours}/conv2", f"{theirs}.conv2"),
        *vqgan_format.conv1x1(f"{ours}/skip", f"{theirs}.conv_shortcut"),
    ]


def _transformer(ours: str, theirs: str) -> list[Rule]:
    inner = f"{theirs}.transformer_blocks.0"
    names = {
        f"{part}/{letter}": f"{inner}.{attention}.{name}"
        for part, attention in (("attention", "attn1"), ("cross_attention", "attn2"))
        for letter, name in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("out", "to_out.0"))
    } | {"up": f"{inner}.ff.net.0.proj", "down": f"{inner}.ff.net.2"}
    norms = {"attention_norm": "norm1", "cross_norm": "norm2", "mlp_norm": "norm3"}
    return [
        *vqgan_format.norm(f"{ours}/norm", f"{theirs}.norm"),
        *vqgan_format.conv1x1(f"{ours}/into", f"{theirs}.proj_in"),
        *vqgan_format.conv1x1(f"{ours}/back", f"{theirs}.proj_out"),
        *(
            rule
            for a, b in norms.items()
            for rule in vqgan_format.norm(f"{ours}/{a}", f"{inner}.{b}")
        ),
        *(rule for a, b in names.items() for rule in _linear(f"{ours}/{a}", b)),
    ]


def _linear(ours: str, theirs: str) -> list[Rule]:
    weight = Rule(f"{ours}/kernel", f"{theirs}.weight", LinearKernel())
    return [weight, Rule(f"{ours}/bias", f"{theirs}.bias")]


def _make_unet(config: ImportedUNetConfig) -> nnx.Module:
    return UNet(config.unet, config.condition_dim, rngs=nnx.Rngs(0))


def _make_vae(config: LatentVAEConfig) -> nnx.Module:
    return LatentVAE(config, rngs=nnx.Rngs(0))


UNET = Family(
    "unet", ImportedUNetConfig, read_unet_config, write_unet_config, _make_unet, unet_rules
)
VAE = Family(
    "vae",
    LatentVAEConfig,
    read_vae_config,
    write_vae_config,
    _make_vae,
    vae_rules,
    rename=rename_vae,
)
