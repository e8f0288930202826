"""CM3Leon (Yu et al. 2023, arXiv 2309.02591): RA-CM3's rows at scale, with a uniform loss.

Section 4 of the paper drops RA-CM3's weighting: retrieved documents count like the query (alpha = 1).
Section 5's decoder has no bias, no LayerNorm parameters and learned absolute positions; its weights start
as N(0, 0.006) cut at three sigma, positions at sigma 0.0002, "output layers" at zero, which reads two ways:

    blocks  the last matrix of every attention and MLP is zero, the head is the embedding
    head    the head is a table of its own, and zero
"""

import dataclasses
from typing import Any

from rag_mm.models import ra_cm3
from rag_mm.nn.decoder import Decoder, DecoderConfig

Model = Decoder
loss_fn = ra_cm3.loss_fn

SIGMA, CUT, POSITION_SIGMA = 0.006, 3.0, 0.0002
# Text 56,320, image codes 8,192, and room for specials and sentinels (paper section 2).
VOCAB_SIZE, CODE_OFFSET, SEQ_LEN = 65_536, 65_536 - 8_192, 4_096
ZERO_OUTPUTS = {
    "blocks": dict(tie_embeddings=True, output_init_std=0.0),
    "head": dict(tie_embeddings=False, output_init_std=SIGMA, head_init_std=0.0),
}


@dataclasses.dataclass(frozen=True)
class CM3LeonConfig(ra_cm3.RACM3Config):
    """RA-CM3's config with the uniform loss; the sizes of the paper's Table 3 as functions."""

    alpha: float = 1.0

    @classmethod
    def tiny(cls, zero_outputs: str = "blocks") -> "CM3LeonConfig":
        """Two layers, for tests and a first look."""
        sizes = dict(vocab_size=512, max_seq_len=128)
        return make_config(2, 64, 4, zero_outputs, code_offset=384, dtype="float32", **sizes)

    @classmethod
    def m350(cls, zero_outputs: str = "blocks") -> "CM3LeonConfig":
        """350 M parameters."""
        return make_config(24, 1024, 16, zero_outputs)

    @classmethod
    def m760(cls, zero_outputs: str = "blocks") -> "CM3LeonConfig":
        """760 M parameters."""
        return make_config(24, 1536, 16, zero_outputs)

    @classmethod
    def b7(cls, zero_outputs: str = "blocks") -> "CM3LeonConfig":
        """7 B parameters."""
        return make_config(32, 4096, 32, zero_outputs)


def make_config(
    num_layers: int,
    embed_dim: int,
    num_heads: int,
    zero_outputs: str = "blocks",
    *,
    vocab_size: int = VOCAB_SIZE,
    max_seq_len: int = SEQ_LEN,
    code_offset: int = CODE_OFFSET,
    dtype: str = "bfloat16",
) -> CM3LeonConfig:
    """The family at any size; an MLP is four times as wide as the stream, its activation OPT's ReLU.

    Raises:
        ValueError: zero_outputs is neither blocks nor head.
    """
    if zero_outputs not in ZERO_OUTPUTS:
        raise ValueError(f"zero_outputs is one of {', '.join(ZERO_OUTPUTS)}, not {zero_outputs!r}")
    outputs: dict[str, Any] = ZERO_OUTPUTS[zero_outputs]
    decoder = DecoderConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        mlp_dim=4 * embed_dim,
        max_seq_len=max_seq_len,
        norm="layernorm_no_params",
        positions="learned",
        mlp="relu",
        init_std=SIGMA,
        init_cut=CUT,
        position_init_std=POSITION_SIGMA,
        dtype=dtype,
        **outputs,
    )
    return CM3LeonConfig(decoder, code_offset)
