"""Chameleon (Chameleon Team 2024, arXiv 2405.09818): text and image tokens in one decoder, section 2.

The decoder is the shared one with q and k normed head by head; the 34B model also norms each branch's output
instead of its input (section 2.3). Image codes are tokens scattered over the vocabulary, as its map says.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Self

import jax
import numpy as np
from flax import nnx

from rag_mm.models import chameleon_vq
from rag_mm.nn.decoder import Decoder, DecoderConfig

_PREFIX, _SUFFIX = "IMGIMG", "Z"
_DIGITS = {chr(ord("A") + digit): str(digit) for digit in range(10)}


@dataclasses.dataclass(frozen=True)
class ChameleonConfig:
    """The decoder, the image tokenizer, and the token of every code."""

    decoder: DecoderConfig
    vq: chameleon_vq.ChameleonVQConfig
    code_tokens: tuple[int, ...]  # by code

    def __post_init__(self):
        if len(self.code_tokens) != self.vq.codebook_size:
            raise ValueError(
                f"there are {len(self.code_tokens)} image tokens for {self.vq.codebook_size} codes"
            )
        if not all(0 <= token < self.decoder.vocab_size for token in self.code_tokens):
            raise ValueError(f"an image token lies outside the {self.decoder.vocab_size} tokens")

    @classmethod
    def chameleon_7b(cls) -> Self:
        """7B parameters, 512-pixel pictures as 1,024 of 8,192 codes (table 1)."""
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
        # The published map; a checkpoint brings its own.
        vq = chameleon_vq.ChameleonVQConfig()
        return cls(decoder, vq, tuple(range(4, 4 + vq.codebook_size)))


def read_code_tokens(vocabulary_map: Mapping[str, int]) -> tuple[int, ...]:
    """Token of every code from the tokenizer's names: `IMGIMGBCZ` is code 12, a letter a digit.

    Raises:
        ValueError: a name that starts so is no code, or the codes have gaps or doubles.
    """
    found: dict[int, int] = {}
    for name, token in vocabulary_map.items():
        if not name.startswith(_PREFIX):
            continue
        letters = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        if not letters or not set(letters) <= set(_DIGITS):
            raise ValueError(f"{name!r} is no name of an image token")
        found[int("".join(_DIGITS[letter] for letter in letters))] = token
    if sorted(found) != list(range(len(found))) or len(set(found.values())) != len(found):
        raise ValueError("its image tokens do not number the codes from 0 on, once each")
    return tuple(found[code] for code in range(len(found)))


def write_code_tokens(code_tokens: tuple[int, ...]) -> dict[str, int]:
    """Names and tokens that `read_code_tokens` reads back."""
    letters = {digit: letter for letter, digit in _DIGITS.items()}
    width = math.ceil(math.log10(max(len(code_tokens), 2)))
    return {
        _PREFIX + "".join(letters[d] for d in str(code).zfill(width)) + _SUFFIX: token
        for code, token in enumerate(code_tokens)
    }


class Chameleon(nnx.Module):
    """Decoder and image tokenizer; `encode` and `decode` speak in tokens."""

    def __init__(self, config: ChameleonConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.decoder = Decoder(config.decoder, rngs=rngs)
        self.vq = chameleon_vq.ChameleonVQ(config.vq, rngs=rngs)

    def encode(self, images: jax.Array) -> jax.Array:
        """float32 [B, S, S, 3] in 0..1 -> tokens int32 [B, N] in raster order."""
        return jax.numpy.asarray(self.config.code_tokens, jax.numpy.int32)[self.vq.encode(images)]


def codes_of(code_tokens: tuple[int, ...], tokens: np.ndarray) -> np.ndarray:
    """Codes int32 of image tokens, of any shape.

    Raises:
        ValueError: one of them is no image token.
    """
    table = {token: code for code, token in enumerate(code_tokens)}
    try:
        codes = [table[token] for token in np.ravel(tokens).tolist()]
    except KeyError as error:
        raise ValueError(f"{error} is no image token") from None
    return np.asarray(codes, np.int32).reshape(np.shape(tokens))
