"""GGUF files of LLaMA's architecture, as llama.cpp writes them: one file of weights, sizes and tokenizer.

A file is described as the Hugging Face checkpoint that it was made from: the values of its config.json, its
tensors under that checkpoint's names, and its other files. Quantized tensors become float32, one at a time.
"""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from rag_mm.convert import gguf_tokenizer, shards
from rag_mm.convert.table import MAX_LAYERS, ConfigReader
from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.ops import rope

TYPES = (
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K".split()
)  # Types of tensors that are read.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_INSTALL = (
    "Reading GGUF files needs the package gguf; install the extra: pip install 'rag_mm[gguf]'."
)


@dataclasses.dataclass(frozen=True)
class GGUFCheckpoint:
    """A GGUF file as the checkpoint folder that it stands for.

    Attributes:
        config: the values of config.json, `model_type` llama.
        specs: tensors under their names in such a folder, float32.
        texts: the folder's other files by name: tokenizer.json, generation_config.json, chat_template.jinja.
    """

    config: Mapping[str, Any]
    specs: Mapping[str, shards.TensorSpec]
    texts: Mapping[str, str]


def open_file(path: epath.PathLike) -> GGUFCheckpoint:
    """Reads everything but the weights.

    Raises:
        UserError: the package gguf is missing; or the file is, or it is damaged or truncated, or of another
            architecture, or has a type of tensor, a tokenizer or a setting that is not supported.
    """
    path = epath.Path(path)
    values, tensors = _read(path)
    _check_architecture(path, values)
    config = _config(path, values, tensors)
    specs = {}
    for name, tensor in tensors.items():
        if name == _ROPE_FACTORS:
            continue
        if tensor.tensor_type.name not in TYPES:
            raise UserError(
                f"{path}: tensor {name} has the type {tensor.tensor_type.name}; the types that are read are "
                f"{', '.join(TYPES)}."
            )
        heads = 0
        if match := re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", name):
            heads = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        decode = functools.partial(_decode, tensor, heads)
        shape = tuple(int(size) for size in tensor.shape[::-1])
        specs[_rename(name)] = shards.TensorSpec(path, "F32", shape, tensor.data_offset, decode)
    texts = {}
    if (tokenizer := gguf_tokenizer.make_json(path, values)) is not None:
        texts["tokenizer.json"] = tokenizer
    if ids := gguf_tokenizer.stop_tokens(path, values):
        texts["generation_config.json"] = files.canonical_json({"eos_token_id": list(ids)})
    if isinstance(template := values.get("tokenizer.chat_template"), str):
        texts["chat_template.jinja"] = template
    return GGUFCheckpoint(config, specs, texts)


def _read(path: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata by key, and the library's tensors by name."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(_INSTALL) from error

    class Reader(gguf.GGUFReader):
        """Says that a file ends too early, where the library would go on with empty arrays."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> Any:
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self.data):
                raise EOFError
            return super()._get(offset, dtype, count, *args, **kwargs)

    files.refuse_special(path)
    if not path.is_file():
        raise UserError(f"{path} is no file; give a GGUF file.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file.")
    try:
        reader = Reader(pathlib.Path(path))
        values = {name: field.contents() for name, field in reader.fields.items()}
        return values, {tensor.name: tensor for tensor in reader.tensors}
    except EOFError:
        raise UserError(f"{path} is truncated; copy it again.") from None
    except Exception as error:  # The library raises many kinds for a damaged file.
        if number := re.search(r"(\d+)\D* is not a valid GGMLQuantizationType", str(error)):
            raise UserError(
                f"{path}: a tensor has the unknown GGUF type {number[1]}; the types that are read are "
                f"{', '.join(TYPES)}."
            ) from None
        raise UserError(f"{path} is damaged ({str(error)[:100]}); copy it again.") from error


def _check_architecture(path: epath.Path, values: Mapping[str, Any]) -> None:
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{path} has the architecture {str(architecture)[:40]!r}; GGUF files of llama are read."
        )
    if values.get("llama.expert_count"):
        raise UserError(
            f"{path} is a mixture of experts, which is not supported; give a dense model."
        )
    scaling = values.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise UserError(
            f"{path} scales its positions by {str(scaling)[:40]!r}, which is not supported."
        )


def _config(
    path: epath.Path, values: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """The values of config.json."""
    r, key = ConfigReader(values, str(path)), "llama.{}".format
    heads = r.get(key("attention.head_count"), int, low=1, high=1 << 16)
    width = r.get(key("embedding_length"), int, low=1)
    head_dim = r.get(key("attention.key_length"), int, width // heads, low=1)
    for name in ("attention.value_length", "rope.dimension_count"):
        if r.get(key(name), int, head_dim) != head_dim:
            raise UserError(
                f"{path}: {key(name)} is not the {head_dim} of llama.attention.key_length."
            )
    if "token_embd.weight" not in tensors:
        raise UserError(f"{path} has no tensor token_embd.weight.")
    theta = _tidy(r.get(key("rope.freq_base"), float, 10_000.0, low=1))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": width,
        "intermediate_size": r.get(key("feed_forward_length"), int, low=1),
        "num_hidden_layers": r.get(key("block_count"), int, low=1, high=MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": r.get(key("attention.head_count_kv"), int, heads, low=1, high=heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": r.get(key("context_length"), int, 2048, low=1),
        "rms_norm_eps": _tidy(r.get(key("attention.layer_norm_rms_epsilon"), float, low=0, high=1)),
        "rope_parameters": _rope(path, theta, head_dim, tensors.get(_ROPE_FACTORS)),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }


def _tidy(value: float) -> float:
    """1e-05 for the float32 next to it, 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope(path: epath.Path, theta: float, head_dim: int, tensor: Any) -> dict[str, Any]:
    """`rope_parameters`; the settings of LLaMA 3.1's scaling are found from the factors that it gives."""
    if tensor is None:
        return {"rope_type": "default", "rope_theta": theta}
    factors = _decode(tensor, 0).ravel()
    half = head_dim // 2
    scaling = rope.Llama3Scaling(max(1.0, float(factors.max(initial=1))), 1.0, 4.0, 8192)
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    expected = np.asarray(frequencies / scaling(frequencies))
    if factors.shape != (half,) or not np.allclose(factors, expected, rtol=1e-3):
        raise UserError(
            f"{path}: {_ROPE_FACTORS} is not the scaling of LLaMA 3.1, the only one that is supported."
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
    }


def _rename(name: str) -> str:
    """The tensor's name in a checkpoint folder; an unknown one stays, and is refused with its shape."""
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name
    theirs = _NAMES[match[2]]
    if ("{}" in theirs) != (match[1] is not None):
        return name
    return f"{theirs.format(match[1])}.{match[3]}"


def _decode(tensor: Any, num_heads: int) -> np.ndarray:
    """The values, float32. Rows of `num_heads` heads (0: none) get the order of transformers.

    Of each head, llama.cpp stores the pairs that RoPE rotates side by side; transformers, and this package,
    store all first ones and then all second ones.
    """
    from gguf import quants

    values = np.asarray(quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
    values = values.reshape(tuple(int(size) for size in tensor.shape[::-1]))
    if not num_heads:
        return values
    rows, rest = values.shape[0], values.shape[1:]
    if rows % (2 * num_heads):
        raise UserError(f"Tensor {tensor.name} has {rows} rows, not those of {num_heads} heads.")
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, math.prod(rest))
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
