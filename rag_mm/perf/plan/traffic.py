"""Analytic lower bounds on the bytes that each chip moves through its memory and keeps in it.

Every operand and result of a product with parameters passes through memory once; attention scores never do,
and elementwise work is free.
"""

import math

import jax.numpy as jnp

from rag_mm.nn.decoder import DecoderConfig
from rag_mm.perf import flops
from rag_mm.perf.plan import decoder_programs


def hbm_bytes(case: decoder_programs.Case) -> float:
    """HBM traffic of one chip per training step, or per decoded token."""
    config = case.model.decoder
    data, fsdp, tensor = case.mesh_shape
    num_params = decoder_programs.count_params(case.model)
    narrow = jnp.dtype(config.dtype).itemsize
    if case.num_new:
        sequences = case.batch_size / (data * fsdp)
        keys = config.max_seq_len - case.num_new / 2
        return narrow * (num_params + sequences * cache_size(config, keys)) / tensor
    # Weights and both moments are read and written in float32; the gathered weights are written and read in
    # every pass of every microbatch.
    passes = 2 + (config.remat == "full")
    weights = 6 * 4 * num_params / math.prod(case.mesh_shape[1:])
    weights += 2 * narrow * num_params / tensor * passes * case.num_parts
    tokens = case.batch_size * config.max_seq_len / (data * fsdp)
    products = 3 + (config.remat == "full")
    layers = config.num_layers * _product_width(case) * products
    return weights + narrow * tokens / tensor * (layers + 3 * config.vocab_size)


def decode_bytes(config: DecoderConfig, num_keys: float) -> float:
    """Bytes read per decoded token at batch size 1 on one chip with `num_keys` keys, in the config's dtype.

    Multiplied weights and the KV cache; the embedding lookup is negligible.
    """
    narrow = jnp.dtype(config.dtype).itemsize
    return narrow * (flops.multiplied_params(config) + cache_size(config, num_keys))


def kept_bytes(case: decoder_programs.Case) -> float:
    """Bytes of activations per chip that one microbatch keeps for the backward pass, given the remat."""
    config = case.model.decoder
    data, fsdp, tensor = case.mesh_shape
    tokens = case.batch_size * config.max_seq_len / (data * fsdp * case.num_parts)
    heads = (2 * config.block.num_heads + 2 * config.block.num_kv_heads) * config.block.head_dim
    hidden = config.mlp_dim * (2 if config.mlp == "swiglu" else 1)
    width = (
        config.embed_dim
        + {
            "full": 0,
            "dots": (heads + hidden) / tensor + 2 * config.embed_dim,
            # Also the outputs of both norms and of the activation.
            "none": (heads + 2 * hidden) / tensor + 4 * config.embed_dim,
        }[config.remat]
    )
    return jnp.dtype(config.dtype).itemsize * tokens * config.num_layers * width


def dcn_bytes(case: decoder_programs.Case, num_slices: int) -> float:
    """Bytes sent between slices in one step."""
    if case.num_new:
        return 0.0
    num_params = decoder_programs.count_params(case.model)
    return gradient_bytes(num_params, case.mesh_shape, num_slices) * case.num_parts


def gradient_bytes(num_params: int, mesh_shape: tuple[int, int, int], num_slices: int) -> float:
    """Bytes that a chip sends between slices for gradients: ring all-reduce of its float32 shard."""
    share = 4 * num_params / math.prod(mesh_shape[1:])
    return 2 * share * (num_slices - 1) / num_slices


def cache_size(config: DecoderConfig, num_keys: float) -> float:
    """Elements of the keys and values of one sequence."""
    return 2 * config.num_layers * config.block.num_kv_heads * config.block.head_dim * num_keys


def _product_width(case: decoder_programs.Case) -> float:
    """Elements read and written by one layer's products, per token."""
    config = case.model.decoder
    q = config.block.num_heads * config.block.head_dim
    kv = config.block.num_kv_heads * config.block.head_dim
    matrices = 3 if config.mlp == "swiglu" else 2
    attention = 4 * config.embed_dim + 2 * q + 2 * kv
    return attention + matrices * (config.embed_dim + config.mlp_dim)
