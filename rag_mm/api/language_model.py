"""A public language model in the hand: ids to logits, prompts to continuations."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rag_mm.core.errors import UserError
from rag_mm.data import public_text
from rag_mm.decode import sampler
from rag_mm.nn.decoder import Decoder, DecoderConfig
from rag_mm.nn.param_trees import Params

# Prompts are filled up to a multiple of this, so that few lengths are compiled.
_MULTIPLE = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Completions:
    """What was written after each prompt: its ids up to the end, and its text where there is a tokenizer."""

    tokens: list[list[int]]
    texts: list[str] | None


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A LLaMA: ids to logits, prompts to continuations."""

    config: DecoderConfig
    graphdef: nnx.GraphDef
    params: Params
    text: public_text.PublicText | None
    ends: tuple[int, ...]  # ids that end a text

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [B, T, V] of ids int32 [B, T]."""
        return np.asarray(_logits(self.params, jnp.asarray(tokens, jnp.int32), self.graphdef))

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        *,
        num_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Completions:
        """Goes on from prompts of different lengths, all in one batch.

        Args:
            prompts: one text, or several texts or lists of ids.
            num_tokens: at most this many for each.
            temperature: 0 takes the likeliest.
            top_p: keeps the likeliest tokens up to this probability.
            seed: the same seed draws the same tokens.

        Raises:
            UserError: a prompt is empty or too long, or is a text and there is no tokenizer.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self._ids(prompt) for prompt in several]
        allowed = np.ones(self.config.vocab_size, bool)
        return self._go_on(ids, allowed, num_tokens, temperature, top_p, seed)

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return need_text(self.text).encode_text(prompt)
        return [int(token) for token in prompt]

    def _go_on(
        self,
        ids: list[list[int]],
        allowed: np.ndarray,
        num_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> Completions:
        c = self.config
        longest = max(map(len, ids), default=0)
        if not ids or not all(ids):
            raise UserError("A prompt is empty; give at least one token.")
        if num_tokens < 1 or longest + num_tokens > c.max_seq_len:
            raise UserError(
                f"{longest} tokens and {num_tokens} more do not fit: the model has {c.max_seq_len} places."
            )
        if any(not 0 <= token < c.vocab_size for row in ids for token in row):
            raise UserError(f"An id lies outside the model's {c.vocab_size:,}.")
        try:
            sampling = sampler.Sampling(temperature, top_p)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        drawn = sampler.sample(
            self.params,
            pad_prompts(ids),
            np.arange(len(ids), dtype=np.uint32) + np.uint32(seed),
            allowed,
            graphdef=self.graphdef,
            num_steps=num_tokens,
            sampling=sampling,
            stop=self.ends[0] if self.ends else None,
        )
        rows = [_cut(row, self.ends) for row in np.asarray(drawn.tokens).tolist()]
        texts = None if self.text is None else [self.text.decode_text(row) for row in rows]
        return Completions(rows, texts)


def need_text(text: public_text.PublicText | None) -> public_text.PublicText:
    """The tokenizer; raises UserError where the checkpoint brought none."""
    if text is None:
        raise UserError(
            "This model was imported without a tokenizer; give ids, or import it from a folder with "
            f"{public_text.TOKENIZER}."
        )
    return text


def pad_prompts(ids: Sequence[Sequence[int]]) -> sampler.Prompts:
    """Prompts of different lengths as one batch, filled up on the left."""
    length = -(-max(map(len, ids)) // _MULTIPLE) * _MULTIPLE
    tokens, positions, segment_ids = np.zeros((3, len(ids), length), np.int32)
    for row, prompt in enumerate(ids):
        tokens[row, -len(prompt) :] = prompt
        positions[row, -len(prompt) :] = np.arange(len(prompt))
        segment_ids[row, -len(prompt) :] = 1
    lengths = np.asarray([len(prompt) for prompt in ids], np.int32)
    return sampler.Prompts(tokens, positions, segment_ids, lengths)


@functools.partial(jax.jit, static_argnames="graphdef")
def _logits(params: Params, tokens: jax.Array, graphdef: nnx.GraphDef) -> jax.Array:
    model: Decoder = nnx.merge(graphdef, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    return model.logits(model(tokens, positions, jnp.ones_like(tokens)))


def _cut(row: list[int], ends: tuple[int, ...]) -> list[int]:
    places = [row.index(end) for end in ends if end in row]
    return row[: min(places)] if places else row
