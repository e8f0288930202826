"""CM3Leon (Yu et al. 2023, arXiv 2309.02591): RA-CM3's sequences at scale, with a uniform loss.

It drops RA-CM3's loss weighting (CM3Leon, section 2.2): the loss is the mean over all targets, those of
retrieved documents included. The paper does not mention sentinels; in the public code they count, too, and
only padding does not. The decoder has no biases, no LayerNorm parameters and learned absolute positions.
Weights start as N(0, sigma) with sigma = 0.006 (positions 0.0002), truncated at three sigma, and "output
layers" as zeros, which can mean:

    blocks  the output projections of attention and MLP are zero; the head is tied to the embedding
    head    the head is untied, and zero
"""

import dataclasses
from typing import Any

from rag_mm.models import ra_cm3
from rag_mm.nn.decoder import Decoder, DecoderConfig, InitConfig

Model = Decoder
loss_fn = ra_cm3.loss_fn

SIGMA, CUT, POSITION_SIGMA = 0.006, 3.0, 0.0002
# 56,320 text tokens and 8,192 image codes (CM3Leon), and room for special tokens and sentinels.
VOCAB_SIZE, CODE_OFFSET, SEQ_LEN = 65_536, 65_536 - 8_192, 4_096
INIT = InitConfig(std=SIGMA, cut=CUT, position_std=POSITION_SIGMA)
# Where the zeros of the paper's initialization are: in each block's output projections, or in the head.
ZERO_OUTPUTS = {
    "blocks": dict(tie_embeddings=True, init=dataclasses.replace(INIT, output_std=0.0)),
    "head": dict(
        tie_embeddings=False, init=dataclasses.replace(INIT, output_std=SIGMA, head_std=0.0)
    ),
}


@dataclasses.dataclass(frozen=True)
class CM3LeonConfig(ra_cm3.RACM3Config):
    """RA-CM3's config with the uniform loss; class methods give the sizes of CM3Leon's table 3."""

    alpha: float = 1.0
    sentinel_weight: float = 1.0
    normalize_by: str = "weights"

    @classmethod
    def tiny(cls, zero_outputs: str = "blocks") -> "CM3LeonConfig":
        """Two layers, for tests and a first look."""
        sizes = dict(vocab_size=512, max_seq_len=128)
        return make_config(2, 64, 4, zero_outputs, code_offset=384, dtype="float32", **sizes)

    @classmethod
    def m350(cls, zero_outputs: str = "blocks") -> "CM3LeonConfig":
        """350M parameters."""
        return make_config(24, 1024, 16, zero_outputs)

    @classmethod
    def m760(cls, zero_outputs: str = "blocks") -> "CM3LeonConfig":
        """760M parameters."""
        return make_config(24, 1536, 16, zero_outputs)

    @classmethod
    def b7(cls, zero_outputs: str = "blocks") -> "CM3LeonConfig":
        """7B parameters."""
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
    """A CM3Leon of any size; the MLP has width 4 * embed_dim and ReLU activations, as in OPT.

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
        dtype=dtype,
        **outputs,
    )
    return CM3LeonConfig(decoder, code_offset)
