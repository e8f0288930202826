"""A tiny checkpoint of Emu under its published names, with random weights, and with a tokenizer."""

import json
import pathlib
import zlib

import numpy as np
import tokenizers

from rag_mm.convert import emu_format, shards, table

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "is",
    "it",
    "a",
    "red",
    "dog",
    "cat",
    "two",
    "what",
    "?",
    "Answer:",
]
SPECIALS = ["[PAD]", "[IMG]", "[/IMG]", "<image>"]
ROLES = ["[USER]", "[ASSISTANT]"]
_LLAMA = dict(
    model_type="llama",
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=96,
    rms_norm_eps=1e-6,
)
# Tensors that the checkpoint holds and no part of the model uses.
UNUSED = {
    "visual.norm.weight": (12,),
    "visual.norm.bias": (12,),
    "visual.head.weight": (4, 12),
    "visual.head.bias": (4,),
    "cformer.cformer.embed_tokens.weight": (5, 8),
    "decoder.lm.model.layers.1.self_attn.rotary_emb.inv_freq": (4,),
}


def make_config(is_instruct=False):
    """A config.json."""
    size = len(WORDS) + len(SPECIALS) + (len(ROLES) if is_instruct else 0)
    return {
        "model_type": "emu",
        "instruct": is_instruct,
        "embed_dim": 4,
        "vision_cfg": dict(
            image_size=8, layers=2, width=12, head_width=6, mlp_ratio=2.5, patch_size=4, xattn=True
        ),
        "vladapter_cfg": {"name": "cformer", "n_causal": 3},
        "cformer_cfg": dict(num_layers=2, d_model=8, num_heads=2, d_kv=4, d_ff=12),
        "decoder": _LLAMA | dict(vocab_size=size),
    }


def draw(name, shape):
    """Values that hide no mistake."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.standard_normal(shape, np.float32)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.3 * values
    return (values if len(shape) < 2 else values / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def make_tensors(config):
    """The published tensors of a config.json."""
    family = emu_format.FAMILY
    mappings = family.mappings(family.read_config(table.CheckpointFolder(config)))
    shapes = {mapping.theirs: mapping.shape for mapping in mappings} | UNUSED
    return {name: draw(name, shape) for name, shape in sorted(shapes.items())}


def write(folder: pathlib.Path, config=None, tensors=None, dtype=np.float32) -> pathlib.Path:
    """Writes the folder that the program in docs/import_export.md would."""
    config = config or make_config()
    tensors = tensors or make_tensors(config)
    folder.mkdir(parents=True)
    shapes = {name: (np.dtype(dtype), array.shape) for name, array in tensors.items()}
    shards.write_folder(folder, shapes, lambda name: tensors[name].astype(dtype), 1 << 30)
    (folder / "config.json").write_text(json.dumps(config))
    text = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    text.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    text.add_special_tokens(["<s>", "</s>", *SPECIALS, *(ROLES if config["instruct"] else [])])
    text.save(str(folder / "tokenizer.json"))
    return folder
