"""Tiny GGUF files, written with the gguf library as llama.cpp's converter does."""

import pathlib
import sys

import gguf
import numpy as np
from tokenizers import pre_tokenizers

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "parity"))
import tiny

MERGES = ["Ġ c", "Ġc a", "Ġca t", "Ġ d", "Ġd o", "Ġdo g", "o w", "Ġ Ġ"]
SPECIALS = ["<|end|>", "<|start|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIALS, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "<|spare|>"]
SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=len(TOKENS),
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def config(**changes) -> dict:
    """A config.json of a checkpoint folder."""
    rope = {"rope_type": "default", "rope_theta": 5_000.0}
    return tiny._LLAMA | SIZES | {"rope_parameters": rope} | changes


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: each pair that RoPE rotates side by side."""
    half = len(weight) // num_heads // 2
    order = [
        head * 2 * half + part * half + pair
        for head in range(num_heads)
        for pair in range(half)
        for part in range(2)
    ]
    return weight[order]


def rename(name: str) -> str:
    """A tensor of a checkpoint folder under llama.cpp's name."""
    stem, suffix = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{suffix}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.{suffix}"


def write(
    path: pathlib.Path,
    tensors: dict[str, np.ndarray],
    values: dict,
    kinds: dict[str, str] | None = None,
    metadata: dict | None = None,
    architecture: str = "llama",
    extra: dict[str, np.ndarray] | None = None,
    raw: dict[str, tuple[np.ndarray, str]] | None = None,
) -> dict[str, np.ndarray]:
    """Writes a file, and returns the tensors' values in it under the names of a checkpoint folder.

    Args:
        path: of the file.
        tensors: of a checkpoint folder.
        values: its config.json.
        kinds: part of a tensor's name in GGUF -> its type; float32 elsewhere.
        metadata: further or other entries; None as a value leaves one out.
        architecture: general.architecture.
        extra: further float32 tensors by their names in GGUF.
        raw: the same of other types, as bytes uint8 [rows, bytes of a row] and the type's name.
    """
    entries = {
        "context_length": values["max_position_embeddings"],
        "embedding_length": values["hidden_size"],
        "block_count": values["num_hidden_layers"],
        "feed_forward_length": values["intermediate_size"],
        "attention.head_count": values["num_attention_heads"],
        "attention.head_count_kv": values["num_key_value_heads"],
        "attention.key_length": values["head_dim"],
        "attention.value_length": values["head_dim"],
        "rope.dimension_count": values["head_dim"],
        "rope.freq_base": float(values["rope_parameters"]["rope_theta"]),
        "attention.layer_norm_rms_epsilon": values["rms_norm_eps"],
    }
    entries = {f"{architecture}.{key}": value for key, value in entries.items()}
    entries |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3 if token.startswith("<|") else 1 for token in TOKENS],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (entries | (metadata or {})).items():
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            kind = gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind
            writer.add_key_value(key, value, kind)
    stored = {}
    for name, array in tensors.items():
        theirs = rename(name)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        count = next((values[heads[key]] for key in heads if f".{key}." in theirs), None)
        ours = array if count is None else permute(array, count)
        kind = next((kind for part, kind in (kinds or {}).items() if part in theirs), "F32")
        kind = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        data = gguf.quantize(ours, kind)
        writer.add_tensor(theirs, data, raw_dtype=kind)
        back = gguf.dequantize(data, kind)
        if count is not None:
            inverse = np.argsort(permute(np.arange(len(back)), count))
            back = back[inverse]
        stored[name] = back.reshape(array.shape)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    for name, (data, kind) in (raw or {}).items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def draw(values: dict) -> dict[str, np.ndarray]:
    """Random tensors of a checkpoint folder with this config.json."""
    from rag_mm.convert import llama_format, table

    family = llama_format.FAMILY
    mappings = family.mappings(family.read_config(table.CheckpointFolder(values)))
    return {mapping.theirs: tiny.draw(mapping.theirs, mapping.shape) for mapping in mappings}
