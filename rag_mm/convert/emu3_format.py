"""Names of the tensors of Emu3's image tokenizer, and its config (`model_type` emu3_vqgan)."""

import math
from collections.abc import Mapping
from typing import Any

from rag_mm.convert import vqgan_format
from rag_mm.convert.table import CheckpointFolder, ConfigReader, LinearKernel, Rule
from rag_mm.convert.vqgan_format import conv, conv1x1, norm
from rag_mm.core.errors import UserError
from rag_mm.models import emu3_vq

_PREFIX, _SUFFIX = "<|visual token ", "|>"


def read_config(
    checkpoint: CheckpointFolder, values: Mapping[str, Any], gain: float
) -> emu3_vq.Emu3VQConfig:
    """The image tokenizer that a vq_config describes.

    Emu3 has no fixed image size. As its image processor enlarges images of fewer pixels than `min_pixels`,
    the size here is the side of a square of so many.

    Raises:
        UserError: our model does not support a setting.
    """
    v = ConfigReader(values, "config.json: vq_config")
    v.require("num_attention_heads", 1, 1)
    defaults = emu3_vq.Emu3VQConfig()
    num_scales = len(
        vqgan_format.read_integers(v, "channel_multiplier", defaults.width_multipliers)
    )
    size = _read_size(checkpoint, 2 ** (num_scales - 1))
    attends = vqgan_format.read_integers(v, "attn_resolutions", (3,))  # indices of scales
    num_frames = v.get("temporal_downsample_factor", int, defaults.num_frames)
    if max(attends, default=0) >= num_scales:
        raise UserError(
            f"config.json: vq_config: attn_resolutions are {attends}, but there are {num_scales} scales."
        )
    sides = tuple(size // 2**scale for scale in attends)
    return vqgan_format.read_config(
        v, defaults, image_size=size, attention_sizes=sides, gain=gain, num_frames=num_frames
    )


def _read_size(checkpoint: CheckpointFolder, code_size: int) -> int:
    r = ConfigReader(checkpoint.preprocessor, checkpoint.preprocessor_file)
    r.require("spatial_factor", code_size, code_size)
    size = ConfigReader(r.get("size", dict, {}), f"{checkpoint.preprocessor_file}: size")
    # The newest transformers writes the number of pixels as `shortest_edge`.
    nested = size.get("min_pixels", int, size.get("shortest_edge", int, 512 * 512))
    min_pixels = r.get("min_pixels", int, nested)
    if min_pixels < code_size**2:
        raise UserError(
            f"{checkpoint.preprocessor_file}: min_pixels is {min_pixels}, less than one code has."
        )
    return math.isqrt(min_pixels) // code_size * code_size


def parse_vocabulary_map(vocabulary_map: Mapping[str, int]) -> tuple[int, ...]:
    """Token of each code, from the tokenizer's token names, such as `<|visual token 000012|>`.

    Raises:
        ValueError: a name with this prefix does not encode a number, or codes are missing or repeated.
    """
    tokens: dict[int, int] = {}
    for name, token in vocabulary_map.items():
        if not name.startswith(_PREFIX):
            continue
        digits = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        if not digits.isdecimal():
            raise ValueError(f"{name!r} is not a valid image token name")
        tokens[int(digits)] = token
    if sorted(tokens) != list(range(len(tokens))) or len(set(tokens.values())) != len(tokens):
        raise ValueError("image tokens do not number the codes consecutively from 0")
    return tuple(tokens[code] for code in range(len(tokens)))


def rules(config: emu3_vq.Emu3VQConfig, theirs: str) -> list[Rule]:
    """The name table; `theirs` is the prefix of the tensors."""
    order = list(range(len(config.width_multipliers)))  # our index -> theirs
    name_rules = [
        Rule("codebook/embedding", f"{theirs}quantize.embedding.weight"),
        *conv("to_embedding", f"{theirs}quant_conv.conv"),
        *conv("from_embedding", f"{theirs}post_quant_conv.conv"),
        *_coder("encoder", f"{theirs}encoder", "to_latent", "down", order),
        *_coder("decoder", f"{theirs}decoder", "to_pixels", "up", order[::-1]),
    ]
    for index in range(config.num_halvings):
        name_rules += conv(f"halvings/{index}", f"{theirs}encoder.time_conv.{index}.conv.conv")
        name_rules += conv(f"doublings/{index}", f"{theirs}decoder.time_conv.{index}.conv.conv")
    for index in range(config.num_res_blocks):
        for side in ("encoder", "decoder"):
            there = f"{theirs}{side}.time_res_stack.{index}"
            name_rules += _time_block(f"{side}_blocks/{index}", there)
    return name_rules


def is_ignored(name: str) -> bool:
    """Whether a tensor is a counter of training steps."""
    return name.endswith(".num_batches_tracked")


def _coder(ours: str, theirs: str, last: str, way: str, order: list[int]) -> list[Rule]:
    """Encoder (way: down) or decoder (up), whose norms read the codes too."""
    middle = f"{theirs}.middle_block"
    name_rules = [
        *conv(f"{ours}/stem", f"{theirs}.conv_in"),
        *_norm(f"{ours}/norm", f"{theirs}.norm_out"),
        *conv(f"{ours}/{last}", f"{theirs}.conv_out"),
        *_block(f"{ours}/middle/block1", f"{middle}.block_1"),
        *_attention(f"{ours}/middle/attention", f"{middle}.attn_1", f"{middle}.attn_norm"),
        *_block(f"{ours}/middle/block2", f"{middle}.block_2"),
    ]
    for scale, their_scale in enumerate(order):
        here, there = f"{ours}/scales/{scale}", f"{theirs}.{way}_block.{way}.{their_scale}"
        name_rules += conv(f"{here}/change", f"{there}.{way}sample.conv")
        for block in range(vqgan_format.MAX_BLOCKS):
            attention = (f"{there}.attn.{block}", f"{there}.attn_norms.{block}")
            name_rules += _block(f"{here}/blocks/{block}", f"{there}.block.{block}")
            name_rules += _attention(f"{here}/attentions/{block}", *attention)
    return name_rules


def _block(ours: str, theirs: str) -> list[Rule]:
    return [
        *_norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *conv(f"{ours}/conv1", f"{theirs}.conv1"),
        *_norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *conv(f"{ours}/conv2", f"{theirs}.conv2"),
        *conv1x1(f"{ours}/skip", f"{theirs}.nin_shortcut"),
    ]


def _attention(ours: str, theirs: str, their_norm: str) -> list[Rule]:
    name_rules = _norm(f"{ours}/norm", their_norm)
    for name in ("q", "k", "v", "out"):
        weight = Rule(f"{ours}/{name}/kernel", f"{theirs}.{name}_proj.weight", LinearKernel())
        name_rules += [weight, Rule(f"{ours}/{name}/bias", f"{theirs}.{name}_proj.bias")]
    return name_rules


def _norm(ours: str, theirs: str) -> list[Rule]:
    """A GroupNorm (in the encoder), or one that reads the codes (in the decoder)."""
    return [
        *norm(ours, theirs),
        *norm(f"{ours}/norm", f"{theirs}.norm_layer"),
        *conv1x1(f"{ours}/scale", f"{theirs}.conv_y"),
        *conv1x1(f"{ours}/shift", f"{theirs}.conv_b"),
    ]


def _time_block(ours: str, theirs: str) -> list[Rule]:
    name_rules = []
    for part in ("1", "2"):
        here, there = f"{ours}/norm{part}", f"{theirs}.norm{part}"
        name_rules += [
            *norm(here, there),
            Rule(f"{here}/mean", f"{there}.running_mean"),
            Rule(f"{here}/variance", f"{there}.running_var"),
            *conv(f"{ours}/conv{part}", f"{theirs}.conv{part}.conv"),
        ]
    return name_rules
