"""LLaMA (Touvron et al. 2023, arXiv 2302.13971): configs of the shared decoder (table 2 of the paper)."""

from rag_mm.nn.decoder import DecoderConfig


def llama_7b() -> DecoderConfig:
    """6.7B parameters."""
    return _sized(num_layers=32, embed_dim=4096, num_heads=32, mlp_dim=11_008)


def llama_13b() -> DecoderConfig:
    """13.0B parameters: the language model of Emu, and one of the two that SPAE uses."""
    return _sized(num_layers=40, embed_dim=5120, num_heads=40, mlp_dim=13_824)


def _sized(num_layers: int, embed_dim: int, num_heads: int, mlp_dim: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=32_000,
        max_seq_len=2048,
        norm_eps=1e-6,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        mlp_dim=mlp_dim,
    )
