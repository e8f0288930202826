"""A tiny language model with random weights and a byte-level tokenizer that knows a few words."""

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers, processors

from rag_mm.data import public_text
from rag_mm.frozen_lm.language_model import LanguageModel
from rag_mm.nn import decoder, param_trees

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t"), ("Ġ", "d"), ("Ġd", "o"), ("Ġdo", "g"), ("i", "n")]
TOKENS = [*ALPHABET, *(left + right for left, right in MERGES), "<s>"]
CONFIG = decoder.DecoderConfig(
    vocab_size=len(TOKENS) + 3,  # more rows than tokens, as padded tables have
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=48,
    max_seq_len=2048,
)


def make_tokenizer(with_start: bool = False) -> public_text.PublicTokenizer:
    """Byte-level BPE; `with_start` puts <s> before every text."""
    ids = {token: i for i, token in enumerate(TOKENS)}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    if with_start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["<s>", "$A"], special_tokens=[("<s>", ids["<s>"])]
        )
    return public_text.PublicTokenizer(tokenizer)


def make_params(config: decoder.DecoderConfig) -> tuple[nnx.GraphDef, param_trees.Params]:
    """Weights large enough for logits that differ."""
    make = lambda: decoder.Decoder(config, rngs=nnx.Rngs(params=0))
    graphdef, abstract = param_trees.describe(make, None)
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), abstract
    )


def make_lm(config: decoder.DecoderConfig = CONFIG, with_start: bool = False) -> LanguageModel:
    """The model with its tokenizer."""
    graphdef, params = make_params(config)
    return LanguageModel(config, graphdef, params, make_tokenizer(with_start), ())


def reference(model: LanguageModel, text: str, candidate: str) -> float:
    """log p(candidate | text), from the logits of the whole sequence."""
    ids, ends = model.text.encode_with_ends(text + candidate)
    padded = ids + [0] * (
        -len(ids) % 64
    )  # What follows changes nothing, and few lengths are compiled.
    logits = model.logits(np.array([padded]))[0].astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return sum(
        log_probs[i - 1, token]
        for i, (token, end) in enumerate(zip(ids, ends, strict=True))
        if end > len(text)
    )
