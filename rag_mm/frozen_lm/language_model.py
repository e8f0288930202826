"""What `rag_mm.load` returns for an imported LLaMA: token ids to logits, prompts to completions."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rag_mm.core import batches
from rag_mm.core.errors import UserError
from rag_mm.data import public_text
from rag_mm.decode import decode_batch, sampler
from rag_mm.frozen_lm import answers, scoring
from rag_mm.frozen_lm.lm_protocol import Completions
from rag_mm.nn.decoder import Decoder, DecoderConfig
from rag_mm.nn.param_trees import Params

Text = TypeVar("Text", bound="TextTokenizer")


class TextTokenizer(Protocol):
    """Texts to token ids and back; `data.public_text.PublicTokenizer` is one."""

    def encode_text(self, text: str) -> list[int]:
        """A text's ids, with the special tokens around it."""

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The same, and the number of the text's characters up to the end of each; 0 before the text."""

    def token_texts(self, size: int) -> tuple[str, ...]:
        """The text of each id below `size`."""

    def decode_continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text of ids that follow a prompt."""


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """An imported LLaMA (`lm_protocol.FrozenLM`).

    Example:
        model = rag_mm.load("runs/llama")
        model.generate("The capital of France is", num_tokens=8).texts[0]
        model.logits(np.asarray([[1, 15043, 3186]]))  # float32 [1, 3, V]
        model.score(["Two and two is"], [" four", " five"])  # float32 [1, 2]

    Attributes:
        config, graphdef, params: the decoder's sizes, structure and parameters.
        text: the tokenizer, or None if the checkpoint has none.
        stop_tokens: token ids that end a text.
        first_position: of a text's first token.
    """

    config: DecoderConfig
    graphdef: nnx.GraphDef
    params: Params
    text: TextTokenizer | None
    stop_tokens: tuple[int, ...]
    first_position: int = dataclasses.field(default=0, kw_only=True)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Next-token logits, float32 [B, T, V], of token ids int32 [B, T]."""
        compute = functools.partial(_logits, self.params, graphdef=self.graphdef)
        mesh = decode_batch.mesh_of(self.params)
        if mesh is None:
            return np.asarray(compute(tokens=jnp.asarray(tokens, jnp.int32)))
        batch = {"tokens": np.asarray(tokens, np.int32)}
        return np.asarray(decode_batch.run_on_mesh(mesh, compute, batch))

    @functools.cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """The text of each token id, with its leading space; empty for an id without a token.

        Raises:
            UserError: the checkpoint was imported without a tokenizer.
        """
        return need_text(self.text).token_texts(self.config.vocab_size)

    def score(
        self,
        prompts: Sequence[str],
        candidates: Sequence[str],
        *,
        prefix: str | None = None,
        calibration: Sequence[str] = (),
    ) -> np.ndarray:
        """log p(candidate | prefix + prompt), float32 [B, C]; see `lm_protocol.FrozenLM.score`."""
        return answers.table(
            functools.partial(
                scoring.log_probs,
                self.graphdef,
                self.params,
                first_position=self.first_position,
            ),
            need_text(self.text).encode_with_ends,
            prompts,
            candidates,
            prefix=prefix,
            calibration=calibration,
            max_length=self.config.max_seq_len - self.first_position,
        )

    def generate(
        self,
        prompts: str | Sequence[str | Sequence[int]],
        *,
        num_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Completions:
        """Completes prompts of different lengths in one batch.

        Args:
            prompts: one text, or a sequence of texts or lists of token ids.
            num_tokens: maximum number of new tokens per prompt, at least 1.
            temperature: softmax temperature, at least 0; 0 is greedy.
            top_p: nucleus sampling, in (0, 1]; keeps the likeliest tokens up to this total probability.
            seed: the same seed gives the same tokens.

        Returns:
            One completion per prompt.

        Raises:
            UserError: an argument is out of range, a prompt is empty or too long, or a prompt is a text and
                the model has no tokenizer.
        """
        allowed = np.ones(self.config.vocab_size, bool)
        ids = self._ids_of(prompts)
        return self._complete(ids, allowed, num_tokens, temperature, top_p, seed)

    def _ids_of(self, prompts: str | Sequence[str | Sequence[int]]) -> list[list[int]]:
        return [
            self._ids(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)
        ]

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            return need_text(self.text).encode_text(prompt)
        return [int(token) for token in prompt]

    def _complete(
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
        most = c.max_seq_len - self.first_position
        if num_tokens < 1 or longest + num_tokens > most:
            raise UserError(
                f"A prompt of {longest} tokens and {num_tokens} new ones exceed the model's maximum "
                f"sequence length of {most}."
            )
        if any(not 0 <= token < c.vocab_size for prompt in ids for token in prompt):
            raise UserError(f"A token id is outside the model's vocabulary of {c.vocab_size:,}.")
        sampler.check_seed(seed)
        try:
            sampling = sampler.Sampling(temperature, top_p)
        except ValueError as error:
            raise UserError(f"{error}.") from None
        completions = self._sample(ids, allowed, num_tokens, sampling, seed)
        texts = None
        if self.text is not None:
            pairs = zip(ids, completions, strict=True)
            texts = [self.text.decode_continuation(prompt, tokens) for prompt, tokens in pairs]
        return Completions(completions, texts)

    def _sample(
        self,
        ids: list[list[int]],
        allowed: np.ndarray,
        num_tokens: int,
        sampling: sampler.Sampling,
        seed: int,
    ) -> list[list[int]]:
        """Completions up to their stop token, in batches that fit into memory.

        One program is compiled per bucket of batch size, prompt length and number of new tokens.
        """
        length, num_steps = _bucket(max(map(len, ids))), _bucket(num_tokens)
        seeds = np.arange(len(ids), dtype=np.uint32) + np.uint32(seed % 2**32)
        size = decode_batch.batch_size(self.config, self.params, length, num_steps)
        sampled = []
        for rows in batches.split(len(ids), size):
            found = sampler.sample(
                self.params,
                pad_prompts([ids[row] for row in rows], length, self.first_position),
                seeds[rows],
                allowed,
                graphdef=self.graphdef,
                num_steps=num_steps,
                sampling=sampling,
                stop=self.stop_tokens[0] if self.stop_tokens else None,
                limit=num_tokens,
            )
            sampled += np.asarray(found.tokens)[:, :num_tokens].tolist()
        return [_cut_at_stop(tokens, self.stop_tokens) for tokens in sampled[: len(ids)]]


def need_text(text: Text | None) -> Text:
    """The tokenizer; raises UserError if the checkpoint has none."""
    if text is None:
        raise UserError(
            "This model was imported without a tokenizer; give token ids, or import it from a folder with "
            f"{public_text.TOKENIZER}."
        )
    return text


def pad_prompts(
    ids: Sequence[Sequence[int]], length: int, first_position: int = 0
) -> sampler.Prompts:
    """Prompts of different lengths as one batch, padded on the left to `length`."""
    tokens, positions, segment_ids = np.zeros((3, len(ids), length), np.int32)
    for row, prompt in enumerate(ids):
        tokens[row, -len(prompt) :] = prompt
        positions[row, -len(prompt) :] = first_position + np.arange(len(prompt))
        segment_ids[row, -len(prompt) :] = 1
    after = np.asarray([first_position + len(prompt) for prompt in ids], np.int32)
    return sampler.Prompts(tokens, positions, segment_ids, after)


def _bucket(count: int) -> int:
    """The next of 16, 32, 48, 64, 96, 128, 192, ...: few sizes are compiled, at most half too large."""
    if count <= 16:
        return 16
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 and power > 32 else power


@functools.partial(jax.jit, static_argnames="graphdef")
def _logits(params: Params, tokens: jax.Array, graphdef: nnx.GraphDef) -> jax.Array:
    model: Decoder = nnx.merge(graphdef, params)
    positions = jnp.zeros_like(tokens) + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return model.logits(model(tokens, positions, jnp.ones_like(tokens)))


def _cut_at_stop(tokens: list[int], stop_tokens: tuple[int, ...]) -> list[int]:
    stops = [tokens.index(token) for token in stop_tokens if token in tokens]
    return tokens[: min(stops)] if stops else tokens
