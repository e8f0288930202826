"""Analytic FLOP counts of a decoder; the compiler's count misses scanned layers and Pallas kernels.

Model FLOPs follow PaLM (Chowdhery et al. 2022, appendix B): six per token and multiplied weight, plus the
attention scores that a causal mask leaves. Recomputation in the backward pass does not count as model FLOPs;
`hardware_flops` adds it.
"""

from typing import TypeVar

import numpy as np

from rag_mm.nn.decoder import DecoderConfig

CONVENTION = (
    "model FLOPs: six per multiplied weight and token and causal attention, without recomputation; a "
    "multiply-add counts as two"
)
"""What an MFU counts, told beside it."""
# One length in tokens, or an array of lengths, for which the result is an array.
Length = TypeVar("Length", float, np.ndarray)


def multiplied_params(config: DecoderConfig) -> int:
    """Number of weights multiplied per token: layers and output head, without the embedding lookup."""
    block = config.block
    heads = block.num_heads + block.num_kv_heads
    attention = 2 * config.embed_dim * block.head_dim * heads
    matrices = 3 if config.mlp == "swiglu" else 2
    mlp = matrices * config.embed_dim * config.mlp_dim
    return config.num_layers * (attention + mlp) + config.vocab_size * config.embed_dim


def forward_flops(config: DecoderConfig, length: Length) -> Length:
    """FLOPs per token of a forward pass, averaged over a causal segment of `length` tokens."""
    block = config.block
    # Scores and weighted values, two FLOPs each, over (length + 1) / 2 keys on average.
    attention = 4 * block.num_heads * block.head_dim * (length + 1) / 2
    return 2 * multiplied_params(config) + config.num_layers * attention


def train_flops(config: DecoderConfig, length: Length) -> Length:
    """FLOPs per token of a forward and backward pass: three forward passes."""
    return 3 * forward_flops(config, length)


def hardware_flops(config: DecoderConfig, length: int, is_loss_chunked: bool) -> float:
    """`train_flops` plus recomputation, per token.

    Remat `full` recomputes the layers. `dots` keeps their matrix products and the residuals of the attention
    kernel, so it recomputes nothing that counts. Chunked logits are computed twice.
    """
    head = 2 * config.vocab_size * config.embed_dim
    recomputed = forward_flops(config, length) - head if config.remat == "full" else 0.0
    return train_flops(config, length) + recomputed + (head if is_loss_chunked else 0.0)


def decode_flops(config: DecoderConfig, num_keys: int) -> float:
    """FLOPs of one decoded token that attends to `num_keys` keys."""
    block = config.block
    attention = 4 * block.num_heads * block.head_dim * num_keys
    return 2 * multiplied_params(config) + config.num_layers * attention
