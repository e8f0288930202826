"""Checkpoints of Emu (`model_type` emu): the tensors of baaivision/Emu's Emu1, as safetensors.

Published are pickles, which nothing here reads: docs/import_export.md has the program that writes a folder of
safetensors, with a config.json that joins the public code's `Emu-14B.json`, the config of its LLaMA under
`decoder`, and that of its T5, where it is not T5-base, under `cformer_cfg`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flax import nnx

from rag_mm.convert import llama_format
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
from rag_mm.core import image_slots
from rag_mm.core.errors import UserError
from rag_mm.models import clip
from rag_mm.models.emu.emu_config import CFormerConfig, EmuConfig, TargetsConfig, VisionConfig
from rag_mm.models.emu.emu_model import Emu

_LM, _T5, _VIT = "decoder.lm.", "cformer.cformer.", "visual."
_T5_LAYER, _VIT_LAYER = f"{_T5}block.{{}}.layer.", f"{_VIT}blocks.{{}}."
_EMBEDDING = f"{_LM}model.embed_tokens.weight"
# Tokens of the base model beyond LLaMA's, [PAD], [IMG], [/IMG], <image>, and of the instruct model, which
# also has [USER] and [ASSISTANT].
NUM_BASE, NUM_INSTRUCT = 4, 6
# In the checkpoint but not used: the tower's last norm and head, T5's token table, RoPE's frequencies.
_UNUSED = re.compile(
    r"visual\.(norm|head)\.(weight|bias)|cformer\.cformer\.embed_tokens\.weight|"
    r"decoder\.lm\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)


@dataclasses.dataclass(frozen=True)
class WithOnes:
    """The tensor has `count` axes of size 1 before ours."""

    count: int = 1

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """See `table.Transform`."""
        return (*(1,) * self.count, *ours)

    def load(self, theirs: Any, ours: tuple[int, ...]) -> Any:
        """See `table.Transform`."""
        return theirs.reshape(ours)

    def save(self, ours: Any) -> Any:
        """See `table.Transform`."""
        return ours.reshape(self.shape(ours.shape))


def read_config(checkpoint: CheckpointFolder) -> EmuConfig:
    """The model that a config.json describes.

    Raises:
        UserError: a setting is missing or not supported, the checkpoint has unmerged LoRA weights, or base
            and instruct model were confused.
    """
    values = checkpoint.config
    _check_kind(checkpoint)
    lm = values.get("decoder")
    if not isinstance(lm, Mapping):
        raise UserError(
            "config.json: decoder is missing; give the config.json of Emu's LLaMA there."
        )
    decoder = llama_format.read_config(CheckpointFolder(lm))
    num_slots = ConfigReader(values.get("vladapter_cfg"), "config.json: vladapter_cfg").get(
        "n_causal", int, 32, low=1
    )
    try:
        return EmuConfig(
            decoder,
            ids=tokens_of(decoder.vocab_size, bool(values.get("instruct", False))),
            vision=_read_vision(ConfigReader(values.get("vision_cfg"), "config.json: vision_cfg")),
            cformer=_read_cformer(
                ConfigReader(values.get("cformer_cfg") or {}, "config.json: cformer_cfg"), num_slots
            ),
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}.") from None


def tokens_of(vocab_size: int, is_instruct: bool) -> image_slots.SlotTokens:
    """The special tokens of a vocabulary whose last tokens Emu added to LLaMA's."""
    first = vocab_size - (NUM_INSTRUCT if is_instruct else NUM_BASE)
    return image_slots.SlotTokens(1, 2, first, first + 1, first + 2, first + 3)


def is_instruct(config: EmuConfig) -> bool:
    """Whether the vocabulary has `[USER]` and `[ASSISTANT]`."""
    return config.decoder.vocab_size - config.ids.pad == NUM_INSTRUCT


def _check_kind(checkpoint: CheckpointFolder) -> None:
    if any(".lora_" in name for name in checkpoint.specs):
        raise UserError(
            "The checkpoint holds LoRA weights beside those of Emu-I's LLaMA; merge them into it, as the "
            "program in docs/import_export.md does, and import the result."
        )
    claims = bool(checkpoint.config.get("instruct", False))
    lm, table = checkpoint.config.get("decoder"), checkpoint.specs.get(_EMBEDDING)
    size = lm.get("vocab_size") if isinstance(lm, Mapping) else None
    kinds = {32_000 + NUM_BASE: "base", 32_000 + NUM_INSTRUCT: "instruct"}
    if isinstance(size, int) and size in kinds and claims != (kinds[size] == "instruct"):
        raise UserError(
            f"config.json says instruct={claims}, but its vocabulary of {size:,} tokens is that of Emu's "
            f"{kinds[size]} model; give the config.json that was written with the weights."
        )
    if table is None or not isinstance(size, int) or len(table.shape) != 2:
        return
    extra = NUM_INSTRUCT - NUM_BASE
    if table.shape[0] - size in (extra, -extra):
        found, said = ("instruct", "base") if table.shape[0] > size else ("base", "instruct")
        raise UserError(
            f"These are the weights of Emu's {found} model, {table.shape[0]:,} tokens, but config.json "
            f"describes the {said} model, {size:,} tokens; give the config.json that was written with them."
        )


def _read_vision(r: ConfigReader) -> VisionConfig:
    width = r.get("width", int, low=1)
    head_width = r.get("head_width", int, 88, low=1)
    for name in ("global_average_pool", "postnorm", "rope", "naiveswiglu", "subln"):
        r.require(name, False, False)
    r.require("qkv_bias", True, True)
    r.require("ls_init_value", None, None)
    if width % head_width:
        raise UserError(
            f"config.json: vision_cfg: head_width={head_width} does not divide {width}."
        )
    ratio = r.get("mlp_ratio", float, 4.0, low=0, high=100)
    layers = r.get("layers", int, low=1, high=MAX_LAYERS)
    sizes = width, layers, width // head_width, int(width * ratio)
    return VisionConfig(
        image_size=r.get("image_size", int, 224),
        patch_size=r.get("patch_size", int, 14),
        vision=clip.TowerConfig(*sizes),
    )


def _read_cformer(r: ConfigReader, num_queries: int) -> CFormerConfig:
    default = CFormerConfig()
    r.require("feed_forward_proj", "relu", "relu")
    return CFormerConfig(
        num_queries=num_queries,
        num_layers=r.get("num_layers", int, default.num_layers, low=1, high=MAX_LAYERS),
        embed_dim=r.get("d_model", int, default.embed_dim),
        num_heads=r.get("num_heads", int, default.num_heads),
        head_dim=r.get("d_kv", int, default.head_dim),
        mlp_dim=r.get("d_ff", int, default.mlp_dim),
        num_buckets=r.get("relative_attention_num_buckets", int, default.num_buckets),
        max_distance=r.get("relative_attention_max_distance", int, default.max_distance),
        norm_eps=r.get("layer_norm_epsilon", float, default.norm_eps, low=0, high=1),
    )


def write_config(config: EmuConfig) -> dict[str, Any]:
    """The config.json of an Emu.

    Raises:
        UserError: it has parts or targets that the published model does not.
    """
    c, v, f = config, config.vision, config.cformer
    if not c.has_tower or not v.is_eva or c.targets != TargetsConfig() or not f.is_causal:
        raise UserError(
            "This Emu is not of the published kind: that has EVA's tower, causal queries and the paper's "
            "targets."
        )
    width = v.vision.embed_dim
    return {
        "model_type": "emu",
        "instruct": is_instruct(c),
        "vision_cfg": {
            "image_size": v.image_size,
            "layers": v.vision.num_layers,
            "width": width,
            "head_width": width // v.vision.num_heads,
            "mlp_ratio": (v.vision.mlp_dim + 0.5) / width,
            "patch_size": v.patch_size,
            "eva_model_name": "eva-clip-g-14-x",
        },
        "vladapter_cfg": {"name": "cformer", "n_causal": f.num_queries},
        "cformer_cfg": {
            "num_layers": f.num_layers,
            "d_model": f.embed_dim,
            "num_heads": f.num_heads,
            "d_kv": f.head_dim,
            "d_ff": f.mlp_dim,
            "relative_attention_num_buckets": f.num_buckets,
            "relative_attention_max_distance": f.max_distance,
            "layer_norm_epsilon": f.norm_eps,
        },
        "decoder": llama_format.write_config(c.decoder),
    }


def rules(config: EmuConfig) -> list[Rule]:
    """The name table."""
    lm = (
        dataclasses.replace(rule, theirs=f"{_LM}{rule.theirs}")
        for rule in llama_format.rules(config.decoder, prefix="decoder/")
    )
    head = Rule("regression/kernel", f"{_LM}stu_regress_head.weight", LinearKernel())
    return [*lm, head, *_norm("ln_visual", "ln_visual"), *_tower(config), *_cformer()]


def _tower(config: EmuConfig) -> list[Rule]:
    ours, layer = "tower/blocks/", _VIT_LAYER
    patches = PatchEmbedding(config.vision.patch_size)
    return [
        Rule("tower/patches/kernel", f"{_VIT}patch_embed.proj.weight", patches),
        Rule("tower/patches/bias", f"{_VIT}patch_embed.proj.bias"),
        Rule("tower/class_embedding", f"{_VIT}cls_token", WithOnes(2)),
        Rule("tower/position_embedding", f"{_VIT}pos_embed", WithOnes()),
        *_norm(f"{ours}attention_norm", f"{layer}norm1"),
        *_norm(f"{ours}mlp_norm", f"{layer}norm2"),
        Rule(f"{ours}attention/qkv/kernel", f"{layer}attn.qkv.weight", LinearKernel()),
        Rule(f"{ours}attention/q_bias", f"{layer}attn.q_bias", Reshape(1)),
        Rule(f"{ours}attention/v_bias", f"{layer}attn.v_bias", Reshape(1)),
        Rule(f"{ours}attention/out/kernel", f"{layer}attn.proj.weight", LinearKernel(2)),
        Rule(f"{ours}attention/out/bias", f"{layer}attn.proj.bias"),
        *(
            Rule(f"{ours}mlp/{a}/{part}", f"{layer}mlp.{b}.{name}", transform)
            for a, b in (("up", "fc1"), ("down", "fc2"))
            for part, name, transform in (
                ("kernel", "weight", LinearKernel()),
                ("bias", "bias", Reshape()),
            )
        ),
    ]


def _cformer() -> list[Rule]:
    ours, layer = "cformer/blocks/", _T5_LAYER
    bias = f"{_T5}block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    norms = enumerate(("attention_norm", "cross_norm", "mlp_norm"))
    attentions = (("attention", "0.SelfAttention"), ("cross_attention", "1.EncDecAttention"))
    letters = (("q", "q", 1), ("k", "k", 1), ("v", "v", 1), ("out", "o", 2))
    return [
        Rule("cformer/queries", "cformer.causal_tokens", WithOnes()),
        Rule("cformer/relative_bias", bias),
        Rule("cformer/norm/scale", f"{_T5}final_layer_norm.weight"),
        Rule("cformer/output/kernel", "cformer.projection.weight", LinearKernel()),
        Rule("cformer/output/bias", "cformer.projection.bias"),
        *(Rule(f"{ours}{name}/scale", f"{layer}{i}.layer_norm.weight") for i, name in norms),
        *(
            Rule(f"{ours}{a}/{x}/kernel", f"{layer}{b}.{y}.weight", LinearKernel(num_in))
            for a, b in attentions
            for x, y, num_in in letters
        ),
        Rule(f"{ours}up/kernel", f"{layer}2.DenseReluDense.wi.weight", LinearKernel()),
        Rule(f"{ours}down/kernel", f"{layer}2.DenseReluDense.wo.weight", LinearKernel()),
    ]


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")]


def _is_ignored(config: EmuConfig, name: str) -> bool:
    del config
    return _UNUSED.fullmatch(name) is not None


def _make_model(config: EmuConfig) -> nnx.Module:
    return Emu(config, rngs=nnx.Rngs(0))


FAMILY = Family("emu", EmuConfig, read_config, write_config, _make_model, rules, _is_ignored)
