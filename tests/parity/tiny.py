"""Tiny checkpoints in Hugging Face's format, from NumPy alone: the same bits on every machine.

Names and shapes come from our name tables, which the tests with torch check against `from_pretrained`; values
are random, seeded by each tensor's name.
"""

import json
import pathlib
import zlib

import ml_dtypes
import numpy as np

from rag_mm.api import importing
from rag_mm.convert import shards, table

VOCAB = 50
_LLAMA = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    hidden_act="silu",
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 5_000.0},
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_DIGITS = {str(i): chr(ord("A") + i) for i in range(10)}
_CODES = 16


def _image_token(code: int) -> str:
    return "IMGIMG" + "".join(_DIGITS[d] for d in str(code)) + "Z"


_CHAMELEON = dict(
    _LLAMA,
    model_type="chameleon",
    architectures=["ChameleonForConditionalGeneration"],
    rms_norm_eps=1e-5,
    # Neither in the order of the codes nor consecutive.
    vocabulary_map={_image_token(code): 3 + (code * 7) % _CODES * 2 for code in range(_CODES)}
    | {"<image>": 1},
    vq_config=dict(
        model_type="chameleon_vqgan",
        embed_dim=6,
        num_embeddings=_CODES,
        latent_channels=10,
        resolution=16,
        base_channels=32,
        channel_multiplier=[1, 2],
        num_res_blocks=1,
        attn_resolutions=[16],
    ),
)
del _CHAMELEON["head_dim"]
_CLIP = dict(
    model_type="clip",
    architectures=["CLIPModel"],
    projection_dim=10,
    vision_config=dict(
        model_type="clip_vision_model",
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=12,
        patch_size=4,
    ),
    text_config=dict(
        model_type="clip_text_model",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=30,
        max_position_embeddings=7,
        eos_token_id=29,
        bos_token_id=28,
        pad_token_id=0,
    ),
)


def _clip_with(text: dict, **both: object) -> dict:
    return dict(
        _CLIP,
        vision_config=_CLIP["vision_config"] | both,
        text_config=_CLIP["text_config"] | both | text,
    )


_SIGLIP = dict(
    model_type="siglip",
    architectures=["SiglipModel"],
    vision_config=dict(
        model_type="siglip_vision_model",
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=14,  # The last 2 pixels fill no patch, as at 384 pixels with patches of 14.
        patch_size=4,
    ),
    text_config=dict(
        model_type="siglip_text_model",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=7,
        projection_size=24,
    ),
)
_NAFLEX = dict(
    _SIGLIP,
    model_type="siglip2",
    architectures=["Siglip2Model"],
    vision_config={k: v for k, v in _SIGLIP["vision_config"].items() if k != "image_size"}
    | dict(model_type="siglip2_vision_model", num_patches=9),
    text_config=_SIGLIP["text_config"] | dict(model_type="siglip2_text_model"),
)


# name -> (family, config.json)
CHECKPOINTS = {
    "llama": ("llama", _LLAMA),
    "llama_gqa": ("llama", _LLAMA | dict(num_key_value_heads=2, head_dim=6)),
    "llama_tied": ("llama", _LLAMA | dict(tie_word_embeddings=True)),
    "llama_3": ("llama", _LLAMA | dict(num_key_value_heads=1, rope_parameters=LLAMA3)),
    "llama_bias": ("llama", _LLAMA | dict(attention_bias=True, mlp_bias=True)),
    "llama_attention_bias": ("llama", _LLAMA | dict(attention_bias=True)),
    "chameleon": ("chameleon", _CHAMELEON),
    "chameleon_swin": ("chameleon", _CHAMELEON | dict(swin_norm=True, num_key_value_heads=2)),
    "clip": ("clip", _clip_with({}, hidden_act="quick_gelu")),
    "clip_gelu": ("clip", _clip_with({}, hidden_act="gelu", layer_norm_eps=1e-4)),
    "clip_legacy": ("clip", _clip_with(dict(eos_token_id=2), hidden_act="quick_gelu")),
    "siglip2": ("siglip2", _SIGLIP),
    "siglip2_naflex": ("siglip2", _NAFLEX),
}
SIGLIPS = [name for name, (family, _) in CHECKPOINTS.items() if family == "siglip2"]
LANGUAGE = [name for name, (family, _) in CHECKPOINTS.items() if family not in ("clip", "siglip2")]
CHAMELEONS = [name for name, (family, _) in CHECKPOINTS.items() if family == "chameleon"]
CLIPS = [name for name, (family, _) in CHECKPOINTS.items() if family == "clip"]


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that hide no mistake: no zero biases, no unit scales, logits that vary."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.standard_normal(shape, np.float32)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.3 * values
    if "embed" in name or len(shape) < 2:
        return np.float32(0.3) * values
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def write(
    folder: pathlib.Path,
    name: str,
    dtype: type = np.float32,
    max_bytes: int = 1 << 30,
    config: dict | None = None,
) -> pathlib.Path:
    """Writes a checkpoint folder with shards of at most `max_bytes`."""
    family_name, values = CHECKPOINTS[name]
    values = config or values
    family = importing.FAMILIES[family_name]
    mappings = family.mappings(family.read_config(table.CheckpointFolder(values)))
    folder.mkdir(parents=True, exist_ok=True)
    # Sorted by name, as most writers do: layer 10 comes before layer 2.
    shapes = {
        p.theirs: (np.dtype(dtype), p.shape) for p in sorted(mappings, key=lambda p: p.theirs)
    }
    read = lambda tensor: draw(tensor, shapes[tensor][1]).astype(dtype)
    shards.write_folder(folder, shapes, read, max_bytes)
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    return folder


BFLOAT16 = ml_dtypes.bfloat16


def tokens(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random token ids, without padding's 0: int32 of this shape."""
    return np.random.default_rng(seed).integers(1, VOCAB, shape).astype(np.int32)


PROMPTS = [tokens((n,), seed=n).tolist() for n in (4, 9, 7)]
NUM_TOKENS = 12


def make_images(count: int, size: int) -> np.ndarray:
    """uint8 [count, size, size, 3]."""
    return np.random.default_rng(3).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def siglip_images(name: str) -> list[np.ndarray]:
    """Batches of images of one size each, uint8; of NaFlex also wide and high ones, of 8 and 6 patches."""
    size = 12 if name == "siglip2_naflex" else 14
    batches = [make_images(4, size)]
    if name == "siglip2_naflex":
        wide = make_images(2, 16)[:, :8]
        batches += [wide, wide.swapaxes(1, 2)[:, :12]]
    return batches


def clip_tokens(name: str) -> np.ndarray:
    """End-of-text tokens at the end, at the beginning, and several times: int32 [4, 7]."""
    rows = np.random.default_rng(0).integers(3, 28, (4, 7)).astype(np.int32)
    for row, places in enumerate([[6], [1], [3, 5], [2, 3, 4, 5, 6]]):
        rows[row, places] = 29
    if name == "clip_legacy":  # The highest id is read, whichever it is.
        rows[1:3][rows[1:3] == 29] = 28
    return rows
