"""FLOPs of a decoder counted by hand: a scanned layer and a Pallas kernel hide from the compiler's own count.

Model FLOPs are what the mathematics needs (PaLM, Chowdhery et al. 2022, appendix B): six for every weight
that is multiplied, a token, and of the attention scores only those that a causal mask leaves. Recomputing
a layer in the backward pass costs the chip and counts for nothing here; it is what `hardware_flops` adds.
"""

from rag_mm.nn.decoder import DecoderConfig


def multiplied_params(config: DecoderConfig) -> int:
    """Weights that multiply every token's vector: layers and head, not the table that is looked up."""
    block = config.block
    heads = block.num_heads + block.num_kv_heads
    attention = 2 * config.embed_dim * block.head_dim * heads
    matrices = 3 if config.mlp == "swiglu" else 2
    mlp = matrices * config.embed_dim * config.mlp_dim
    return config.num_layers * (attention + mlp) + config.vocab_size * config.embed_dim


def forward_flops(config: DecoderConfig, length: int) -> float:
    """Of one token, on average over a causal row of `length` tokens in one segment."""
    block = config.block
    # Scores and weighted values, two each, over (length + 1) / 2 keys on average.
    attention = 4 * block.num_heads * block.head_dim * (length + 1) / 2
    return 2 * multiplied_params(config) + config.num_layers * attention


def train_flops(config: DecoderConfig, length: int) -> float:
    """Of one token's forward and backward pass: three forward passes."""
    return 3 * forward_flops(config, length)


def hardware_flops(config: DecoderConfig, length: int, is_loss_chunked: bool) -> float:
    """`train_flops` and what remat computes again, a token.

    `full` repeats the layers. `dots` keeps their products and the attention kernel's own memory, so
    nothing that counts. Chunked logits are made twice.
    """
    head = 2 * config.vocab_size * config.embed_dim
    again = forward_flops(config, length) - head if config.remat == "full" else 0.0
    return train_flops(config, length) + again + (head if is_loss_chunked else 0.0)


def decode_flops(config: DecoderConfig, num_keys: int) -> float:
    """Of one new token that sees `num_keys` keys."""
    block = config.block
    attention = 4 * block.num_heads * block.head_dim * num_keys
    return 2 * multiplied_params(config) + config.num_layers * attention
