"""Names of a VQGAN's tensors, and its sizes in a `vq_config`: Chameleon's and Janus' image tokenizers."""

from collections.abc import Mapping
from typing import Any, TypeVar

from rag_mm.convert.table import ConfigReader, ConvKernel, LinearKernel, Rule
from rag_mm.core import checks
from rag_mm.core.errors import UserError
from rag_mm.models import vqgan

MAX_BLOCKS = checks.MAX_BLOCKS + 1  # Decoders have one more. Rules without a parameter are ignored.
C = TypeVar("C", bound=vqgan.VQGANConfig)
_CONV1X1 = LinearKernel(tail=(1, 1))


def read_config(v: ConfigReader, defaults: C, **more: Any) -> C:
    """The config of the class of `defaults` that a vq_config describes; `more` are values from elsewhere.

    Raises:
        UserError: a setting that our model does not support.
    """
    v.require("double_latent", False, False)
    v.require("in_channels", 3, 3)
    v.require("out_channels", 3, 3)
    d = defaults
    size_key = "codebook_size" if v.get("codebook_size", int, 0) else "num_embeddings"
    sizes: dict[str, Any] = {
        "width": v.get("base_channels", int, d.width),
        "width_multipliers": read_integers(v, "channel_multiplier", d.width_multipliers),
        "num_res_blocks": v.get("num_res_blocks", int, d.num_res_blocks, high=checks.MAX_BLOCKS),
        "latent_dim": v.get("latent_channels", int, d.latent_dim),
        "embed_dim": v.get("embed_dim", int, d.embed_dim),
        "codebook_size": v.get(size_key, int, d.codebook_size),
    }
    try:
        return type(defaults)(**sizes, **more)
    except ValueError as error:
        raise UserError(f"config.json: vq_config: {error}.") from None


def read_integers(v: ConfigReader, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """A list of at most `MAX_BLOCKS` integers from 0.

    Raises:
        UserError: it is anything else.
    """
    values = v.get(key, list, list(default))
    if len(values) > MAX_BLOCKS or any(
        type(value) is not int or not 0 <= value <= checks.MAX_SIZE for value in values
    ):
        raise UserError(
            f"config.json: vq_config: {key} is {str(values)[:80]}, which are not all integers from 0, "
            f"or more than {MAX_BLOCKS}."
        )
    return tuple(values)


def read_vocabulary_map(config: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the tokens by name, in a config.json.

    Raises:
        UserError: it is missing, or an id is no integer.
    """
    vocabulary_map = ConfigReader(config, "config.json").get("vocabulary_map", dict)
    if any(type(id) is not int or not 0 <= id <= checks.MAX_SIZE for id in vocabulary_map.values()):
        raise UserError("config.json: vocabulary_map holds an id that is no integer from 0.")
    return vocabulary_map


def rules(
    config: vqgan.VQGANConfig, ours: str, theirs: str, is_coarse_first: bool = False
) -> list[Rule]:
    """The name table.

    Args:
        config: the image tokenizer.
        ours: prefix of our parameters.
        theirs: prefix of the tensors.
        is_coarse_first: whether `decoder.up.0` is the coarsest grid, as in Janus, or the finest.
    """
    order = list(range(len(config.width_multipliers)))  # our index -> theirs
    ups = order if is_coarse_first else order[::-1]
    return [
        Rule(f"{ours}codebook/embedding", f"{theirs}quantize.embedding.weight"),
        *conv1x1(f"{ours}to_embedding", f"{theirs}quant_conv"),
        *conv1x1(f"{ours}from_embedding", f"{theirs}post_quant_conv"),
        *_coder(f"{ours}encoder", f"{theirs}encoder", "to_latent", "down", order),
        *_coder(f"{ours}decoder", f"{theirs}decoder", "to_pixels", "up", ups),
    ]


def _coder(ours: str, theirs: str, last: str, way: str, order: list[int]) -> list[Rule]:
    """Encoder (way: down) or decoder (up); `order` is their index of each of our scales."""
    name_rules = [
        *conv(f"{ours}/stem", f"{theirs}.conv_in"),
        *norm(f"{ours}/norm", f"{theirs}.norm_out"),
        *conv(f"{ours}/{last}", f"{theirs}.conv_out"),
        *_block(f"{ours}/middle/block1", f"{theirs}.mid.block_1"),
        *_attention(f"{ours}/middle/attention", f"{theirs}.mid.attn_1"),
        *_block(f"{ours}/middle/block2", f"{theirs}.mid.block_2"),
    ]
    for scale, their_scale in enumerate(order):
        here, there = f"{ours}/scales/{scale}", f"{theirs}.{way}.{their_scale}"
        name_rules += conv(f"{here}/change", f"{there}.{way}sample.conv")
        for block in range(MAX_BLOCKS):
            name_rules += _block(f"{here}/blocks/{block}", f"{there}.block.{block}")
            name_rules += _attention(f"{here}/attentions/{block}", f"{there}.attn.{block}")
    return name_rules


def _block(ours: str, theirs: str) -> list[Rule]:
    return [
        *norm(f"{ours}/norm1", f"{theirs}.norm1"),
        *conv(f"{ours}/conv1", f"{theirs}.conv1"),
        *norm(f"{ours}/norm2", f"{theirs}.norm2"),
        *conv(f"{ours}/conv2", f"{theirs}.conv2"),
        *conv1x1(f"{ours}/skip", f"{theirs}.nin_shortcut"),
    ]


def _attention(ours: str, theirs: str) -> list[Rule]:
    name_rules = norm(f"{ours}/norm", f"{theirs}.norm")
    for here, there in {"q": "q", "k": "k", "v": "v", "out": "proj_out"}.items():
        name_rules += conv1x1(f"{ours}/{here}", f"{theirs}.{there}")
    return name_rules


def norm(ours: str, theirs: str) -> list[Rule]:
    """Scale and bias of a norm."""
    return [Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")]


def conv(ours: str, theirs: str) -> list[Rule]:
    """Kernel and bias of a convolution."""
    weight = Rule(f"{ours}/kernel", f"{theirs}.weight", ConvKernel())
    return [weight, Rule(f"{ours}/bias", f"{theirs}.bias")]


def conv1x1(ours: str, theirs: str) -> list[Rule]:
    """A 1x1 convolution, which is a linear layer here."""
    weight = Rule(f"{ours}/kernel", f"{theirs}.weight", _CONV1X1)
    return [weight, Rule(f"{ours}/bias", f"{theirs}.bias")]
