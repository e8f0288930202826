"""PyTorch and transformers as the peer of our training step and decoding: a LLaMA of the same shape."""

import importlib.metadata
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from rag_mm.core.errors import UserError
from rag_mm.nn.decoder import DecoderConfig


def load() -> tuple[types.ModuleType, types.ModuleType]:
    """Imports torch and transformers.

    Raises:
        UserError: one of them is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise UserError(
            "PyTorch and transformers are not installed: pip install '.[parity]'."
        ) from None
    return torch, transformers


def versions() -> dict[str, str]:
    """Versions of torch and transformers."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def make_train_step(
    config: DecoderConfig, learning_rate: float, num_threads: int, is_compiled: bool
) -> Callable[[np.ndarray], float]:
    """ids int [B, T] -> the loss of one float32 Adam step on them, in nats per token."""
    torch, _ = load()
    model = _make_model(config, num_threads).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    forward = torch.compile(model) if is_compiled else model

    def step(ids: np.ndarray) -> float:
        tokens = torch.from_numpy(ids).long()
        optimizer.zero_grad(set_to_none=True)
        loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def make_generate(
    config: DecoderConfig, num_threads: int
) -> Callable[[np.ndarray, int], np.ndarray]:
    """(prompts int [B, T], count) -> int [B, count], greedy tokens."""
    torch, _ = load()
    model = _make_model(config, num_threads).eval()

    def generate(prompts: np.ndarray, count: int) -> np.ndarray:
        tokens = torch.from_numpy(prompts).long()
        with torch.no_grad():
            sequences = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
            )
        return sequences[:, prompts.shape[1] :].numpy()

    return generate


def _make_model(config: DecoderConfig, num_threads: int) -> Any:
    torch, transformers = load()
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    llama_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.embed_dim,
        intermediate_size=config.mlp_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(llama_config).float()
