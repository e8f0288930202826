"""Hugging Face checkpoints of LLaMA (`model_type` llama): config and name table."""

import re
from collections.abc import Mapping
from typing import Any

from flax import nnx

from rag_mm.convert import shards
from rag_mm.convert.table import (
    MAX_LAYERS,
    CheckpointFolder,
    ConfigReader,
    Family,
    LinearKernel,
    Reshape,
    Rule,
    Specs,
)
from rag_mm.core.errors import UserError
from rag_mm.nn.decoder import Decoder, DecoderConfig
from rag_mm.ops import rope

_LAYER = "model.layers.{}."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
MODULES = {
    "attention/q": ("self_attn.q_proj", 1),
    "attention/k": ("self_attn.k_proj", 1),
    "attention/v": ("self_attn.v_proj", 1),
    "attention/out": ("self_attn.o_proj", 2),
    "mlp/gate": ("mlp.gate_proj", 1),
    "mlp/up": ("mlp.up_proj", 1),
    "mlp/down": ("mlp.down_proj", 1),
}
FLAT = Reshape(1)  # our bias [N, H] is their [N * H]
NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def read_config(checkpoint: CheckpointFolder) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises:
        UserError: a setting is missing, or our decoder does not support it.
    """
    return read_decoder(checkpoint, default_eps=1e-6)


def read_decoder(checkpoint: CheckpointFolder, default_eps: float, **fields: Any) -> DecoderConfig:
    """The settings that LLaMA and Chameleon share; `fields` are further fields of our config."""
    values = checkpoint.config
    v = ConfigReader(values, "config.json")
    v.require("hidden_act", "silu", "silu")
    use_bias, mlp_bias = (
        v.require(name, False, False, True) for name in ("attention_bias", "mlp_bias")
    )
    num_heads = v.get("num_attention_heads", int, low=1)
    num_kv_heads = v.get("num_key_value_heads", int, num_heads, low=1)
    if num_heads % num_kv_heads:
        raise UserError(f"config.json: {num_kv_heads} key heads do not divide {num_heads} heads.")
    head_dim = v.get("head_dim", int, v.get("hidden_size", int) // num_heads, low=2)
    if head_dim % 2:
        raise UserError(
            f"config.json: head_dim is {head_dim}; RoPE turns pairs, so give an even one."
        )
    try:
        theta, scaling = _read_rope(values, v)
        return DecoderConfig(
            vocab_size=v.get("vocab_size", int, low=1),
            num_layers=v.get("num_hidden_layers", int, low=1, high=MAX_LAYERS),
            embed_dim=v.get("hidden_size", int),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            mlp_dim=v.get("intermediate_size", int),
            max_seq_len=v.get("max_position_embeddings", int, 2048),
            norm_eps=v.get("rms_norm_eps", float, default_eps, low=0, high=1),
            rope_theta=theta,
            rope_scaling=scaling,
            use_bias=use_bias,
            mlp_bias=None if mlp_bias == use_bias else mlp_bias,
            tie_embeddings=v.get("tie_word_embeddings", bool, False) and _can_tie(checkpoint.specs),
            **fields,
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}.") from None


def _can_tie(specs: Specs) -> bool:
    """Whether there is no head that differs from the embedding; like transformers, one that does is used."""
    head, embedding = specs.get(_HEAD), specs.get(_EMBEDDING)
    return head is None or embedding is None or shards.is_equal(head, embedding)


def rename(config: DecoderConfig, specs: Specs) -> Specs:
    """The tensors by name; a tied embedding that was saved as the head alone gets the embedding's name."""
    if not config.tie_embeddings or _EMBEDDING in specs or _HEAD not in specs:
        return specs
    return {_EMBEDDING if name == _HEAD else name: spec for name, spec in specs.items()}


def _read_rope(
    values: Mapping[str, Any], v: ConfigReader
) -> tuple[float, rope.Llama3Scaling | None]:
    # transformers 5 has one object; before it, the base was a key next to `rope_scaling`.
    table = values.get("rope_parameters") or values.get("rope_scaling") or {}
    r = ConfigReader(table, "config.json: rope_parameters")
    theta = r.get("rope_theta", float, v.get("rope_theta", float, 10_000.0), low=1)
    type_key = "rope_type" if "rope_type" in table else "type"
    if r.require(type_key, "default", "default", "llama3") == "default":
        return theta, None
    return theta, rope.Llama3Scaling(
        r.get("factor", float, high=1e6),
        r.get("low_freq_factor", float, high=1e6),
        r.get("high_freq_factor", float, high=1e6),
        r.get("original_max_position_embeddings", int),
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder of this family.

    Raises:
        UserError: it has a setting that LLaMA does not.
    """
    check_family(config, "LLaMA", qk_norm=False, post_norm=False)
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | write_decoder(config)


def check_family(config: DecoderConfig, family: str, **settings: Any) -> None:
    """Raises UserError if a decoder is not of a family; `settings` are further ones that the family fixes."""
    fixed = {
        "norm": "rmsnorm",
        "positions": "rope",
        "mlp": "swiglu",
        "smear_lags": (),
        "scale_embeddings": False,
    }
    for name, expected in (fixed | settings).items():
        if (value := getattr(config, name)) != expected:
            raise UserError(
                f"This decoder is not a {family}: its {name} is {value!r}, {family}'s is {expected!r}."
            )


def write_decoder(config: DecoderConfig) -> dict[str, Any]:
    """The config.json keys that LLaMA and Chameleon share."""
    c, table = config, {"rope_type": "default", "rope_theta": config.rope_theta}
    if c.rope_scaling is not None:
        table |= {
            "rope_type": "llama3",
            "factor": c.rope_scaling.factor,
            "low_freq_factor": c.rope_scaling.low_freq_factor,
            "high_freq_factor": c.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": c.rope_scaling.original_length,
        }
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.block.num_kv_heads,
        "head_dim": c.block.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": table,
        "attention_bias": c.use_bias,
        "mlp_bias": c.use_bias if c.mlp_bias is None else c.mlp_bias,
        "tie_word_embeddings": c.tie_embeddings,
    }


def rules(config: DecoderConfig, prefix: str = "") -> list[Rule]:
    """The name table; `prefix` precedes each of our paths."""
    blocks = f"{prefix}stack/blocks/"
    name_rules = [
        Rule(f"{prefix}embedding/table", _EMBEDDING),
        Rule(f"{prefix}norm/scale", "model.norm.weight"),
        Rule(f"{prefix}head/table", _HEAD),
        *(Rule(f"{blocks}{a}/scale", f"{_LAYER}{b}.weight") for a, b in NORMS.items()),
    ]
    for ours, (theirs, num_in) in MODULES.items():
        weight = Rule(f"{blocks}{ours}/kernel", f"{_LAYER}{theirs}.weight", LinearKernel(num_in))
        name_rules += [weight, Rule(f"{blocks}{ours}/bias", f"{_LAYER}{theirs}.bias", FLAT)]
    return name_rules


def is_ignored(config: DecoderConfig, name: str) -> bool:
    """RoPE frequencies of old checkpoints, and a head that equals the embedding."""
    if config.tie_embeddings and name == _HEAD:
        return True
    return re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name) is not None


def _make_model(config: DecoderConfig) -> nnx.Module:
    return Decoder(config, rngs=nnx.Rngs(params=0))


FAMILY = Family(
    "llama", DecoderConfig, read_config, write_config, _make_model, rules, is_ignored, rename
)
