"""A tiny LLaMA checkpoint with a byte-level tokenizer, for an Emu that starts from it."""

import json
import zlib

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from rag_mm.api import importing
from rag_mm.convert import shards, table

CONFIG = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    bos_token_id=1,
    eos_token_id=2,
)


def make_tokenizer():
    """<unk>, <s> and </s>, then the bytes and what they merge to; <s> begins a text."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(["red apple at the top left on a blue background"] * 9, trainer)
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made


def write(folder, has_tokenizer=True, **changes):
    """Writes the checkpoint's folder and returns it; values are random, seeded by each tensor's name."""
    folder.mkdir()
    made = make_tokenizer()
    config = {**CONFIG, "vocab_size": made.get_vocab_size(), **changes}
    family = importing.find_family("llama")
    mappings = family.mappings(family.read_config(table.CheckpointFolder(config)))
    tensors = {
        each.theirs: 0.1
        * np.random.default_rng(zlib.crc32(each.theirs.encode())).standard_normal(each.shape)
        for each in mappings
    }
    shapes = {name: (np.dtype(np.float32), array.shape) for name, array in tensors.items()}
    shards.write_folder(folder, shapes, lambda name: tensors[name].astype(np.float32), 1 << 30)
    (folder / "config.json").write_text(json.dumps(config))
    if has_tokenizer:
        made.save(str(folder / "tokenizer.json"))
    return folder


def imported(place, **changes):
    """A run of `rag-mm import llama`, below a folder."""
    importing.import_checkpoint("llama", write(place / "theirs", **changes), place / "llama")
    return str(place / "llama")
