"""Chameleon (Chameleon Team 2024, arXiv 2405.09818, section 2): text and image tokens in one decoder.

The decoder is the shared one with per-head normalization of q and k; the 34B model also normalizes each
branch's output instead of its input (Chameleon, section 2.3). Image codes are tokens at arbitrary ids, which
the tokenizer's vocabulary map gives.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from rag_mm.core import sharding
from rag_mm.models import vqgan
from rag_mm.nn.decoder import Decoder, DecoderConfig

_PREFIX, _SUFFIX = "IMGIMG", "Z"
_DIGITS = {chr(ord("A") + digit): str(digit) for digit in range(10)}


@dataclasses.dataclass(frozen=True)
class ChameleonConfig:
    """Configs of the decoder and the image tokenizer, and the token of each code."""

    decoder: DecoderConfig
    vq: vqgan.VQGANConfig
    code_tokens: tuple[int, ...]  # code -> token

    def __post_init__(self):
        if len(self.code_tokens) != self.vq.codebook_size:
            raise ValueError(
                f"there are {len(self.code_tokens)} image tokens for {self.vq.codebook_size} codes"
            )
        if not all(0 <= token < self.decoder.vocab_size for token in self.code_tokens):
            raise ValueError(
                f"an image token is outside the vocabulary of {self.decoder.vocab_size} tokens"
            )

    @classmethod
    def chameleon_7b(cls) -> "ChameleonConfig":
        """7B parameters; 512-pixel images as 1,024 codes from a codebook of 8,192 (Chameleon, table 1)."""
        decoder = DecoderConfig(
            vocab_size=65_536,
            num_layers=32,
            embed_dim=4096,
            num_heads=32,
            mlp_dim=11_008,
            max_seq_len=4096,
            qk_norm=True,
            qk_norm_kind="layernorm_per_head",
        )
        # The published vocabulary map; a checkpoint brings its own.
        vq = vqgan.VQGANConfig()
        return cls(decoder, vq, tuple(range(4, 4 + vq.codebook_size)))


def parse_vocabulary_map(vocabulary_map: Mapping[str, int]) -> tuple[int, ...]:
    """Token of each code, from the tokenizer's token names: in `IMGIMGBCZ`, B and C are digits of code 12.

    Raises:
        ValueError: a name with this prefix does not encode a number, or codes are missing or repeated.
    """
    code_tokens: dict[int, int] = {}
    for name, token in vocabulary_map.items():
        if not name.startswith(_PREFIX):
            continue
        letters = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        if not letters or not set(letters) <= set(_DIGITS):
            raise ValueError(f"{name!r} is not a valid image token name")
        code_tokens[int("".join(_DIGITS[letter] for letter in letters))] = token
    num_codes = len(code_tokens)
    if sorted(code_tokens) != list(range(num_codes)):
        raise ValueError("image tokens do not number the codes consecutively from 0")
    if len(set(code_tokens.values())) != num_codes:
        raise ValueError("two image tokens share one id")
    return tuple(code_tokens[code] for code in range(num_codes))


def make_vocabulary_map(code_tokens: tuple[int, ...]) -> dict[str, int]:
    """Token names and ids, from which `parse_vocabulary_map` recovers `code_tokens`."""
    letters = {digit: letter for letter, digit in _DIGITS.items()}
    width = math.ceil(math.log10(max(len(code_tokens), 2)))
    return {
        _PREFIX + "".join(letters[d] for d in str(code).zfill(width)) + _SUFFIX: token
        for code, token in enumerate(code_tokens)
    }


class Chameleon(nnx.Module):
    """Chameleon: a decoder over text and image tokens, and its image tokenizer."""

    def __init__(self, config: ChameleonConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.decoder = Decoder(config.decoder, rngs=rngs)
        self.vq = vqgan.VQGAN(config.vq, rngs=rngs)

    @sharding.automatic("batch")
    def encode(self, images: Float[Array, "B H W 3"]) -> Int32[Array, "B C"]:
        """Image tokens of images in 0..1, in raster order."""
        return jnp.asarray(self.config.code_tokens, jnp.int32)[self.vq.encode(images)]


def tokens_to_codes(
    code_tokens: tuple[int, ...], tokens: Int[np.ndarray, "*shape"]
) -> Int32[np.ndarray, "*shape"]:
    """Codes of image tokens.

    Raises:
        ValueError: one of them is not an image token.
    """
    table = {token: code for code, token in enumerate(code_tokens)}
    try:
        codes = [table[token] for token in np.ravel(tokens).tolist()]
    except KeyError as error:
        raise ValueError(f"token {error} is not an image token") from None
    return np.asarray(codes, np.int32).reshape(np.shape(tokens))
