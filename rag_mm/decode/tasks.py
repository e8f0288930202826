"""The ways a CM3 model is asked (RA-CM3, spec section 7): draw a caption, describe a picture, fill a hole.

Every mode puts given documents, retrieved or by hand, before the prompt and samples with the logits
restricted to what may stand there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx

from rag_mm.core.errors import UserError
from rag_mm.data import sequences
from rag_mm.data.vocabulary import Vocabulary
from rag_mm.decode import sampler
from rag_mm.nn.param_trees import Params

Docs = Sequence[sequences.Example]


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A trained decoder with the ids and the row layout it was trained on."""

    graphdef: nnx.GraphDef
    params: Params
    vocabulary: Vocabulary
    layout: sequences.Layout

    def allow(self, *ids: slice | int) -> np.ndarray:
        """Which tokens may be drawn: bool [V], V being the model's, not the vocabulary's, size."""
        allowed = np.zeros(self.params["embedding"]["table"].shape[0], bool)
        for part in ids:
            allowed[part] = True
        return allowed

    @property
    def allowed_codes(self) -> np.ndarray:
        """The image codes: bool [V]."""
        start = self.vocabulary.code_offset
        return self.allow(slice(start, start + self.vocabulary.codebook_size))


class SampledCodes(NamedTuple):
    """Codes int32 [B, N] and each row's log-probability, float32 [B], in nats."""

    codes: np.ndarray
    log_probs: np.ndarray


def generate_codes(
    generator: Generator,
    texts: Sequence[Sequence[int]],
    docs: Sequence[Docs],
    seeds: np.ndarray,
    sampling: sampler.Sampling,
    batch_size: int = 64,
) -> SampledCodes:
    """Caption to image: exactly `layout.num_codes` codes for each text.

    Args:
        generator: the model.
        texts: text ids, at most `layout.max_text_len` each.
        docs: for each text the documents to read first; at most `layout.max_docs`.
        seeds: uint32 [B]; a row depends on its own seed, text and documents alone.
        sampling: temperature and top-p.
        batch_size: rows sampled at once.
    """
    layout, words = generator.layout, generator.vocabulary
    prompts = [
        sequences.caption_to_image_prompt(layout, words, text, found)
        for text, found in zip(texts, docs, strict=True)
    ]
    longest = 1 + layout.max_text_len + 1 + layout.max_docs * layout.slot
    sampled = _sample(
        generator,
        prompts,
        longest,
        seeds,
        sampling,
        generator.allowed_codes,
        layout.num_codes,
        batch_size,
    )
    return SampledCodes(sampled.tokens - words.code_offset, sampled.log_probs.sum(axis=1))


def generate_captions(
    generator: Generator,
    codes: np.ndarray,
    docs: Sequence[Docs],
    seeds: np.ndarray,
    sampling: sampler.Sampling,
    batch_size: int = 64,
) -> tuple[list[str], np.ndarray]:
    """Image to caption, in the infill form: a sentinel stands for the caption and is resolved last.

    Args:
        generator: the model.
        codes: int32 [B, num_codes] of the pictures.
        docs, seeds, sampling, batch_size: as in `generate_codes`.

    Returns:
        Captions, and each one's log-probability, float32 [B].
    """
    layout, words = generator.layout, generator.vocabulary
    prompts = [
        sequences.image_to_caption_prompt(layout, words, own, found)
        for own, found in zip(codes, docs, strict=True)
    ]
    longest = 1 + 1 + 1 + layout.num_codes + 1 + 1 + layout.max_docs * layout.slot
    allowed = generator.allow(slice(words.text_size), words.eoss)
    steps = layout.max_text_len + 1
    sampled = _sample(
        generator, prompts, longest, seeds, sampling, allowed, steps, batch_size, stop=words.eoss
    )
    texts = [words.decode_text(row[: _end(row, words.eoss)]) for row in sampled.tokens]
    return texts, sampled.log_probs.sum(axis=1)


def infill_codes(
    generator: Generator,
    mains: Sequence[sequences.Example],
    hole: tuple[int, int],
    docs: Sequence[Docs],
    seeds: np.ndarray,
    sampling: sampler.Sampling,
    batch_size: int = 64,
) -> SampledCodes:
    """Fills codes [start, end) of pictures, seeing what stands on both sides of the hole.

    Args:
        generator: the model.
        mains: captions with their pictures; codes inside the hole do not matter.
        hole: start and end, in raster order.
        docs, seeds, sampling, batch_size: as in `generate_codes`.

    Returns:
        Whole pictures' codes, the hole filled.

    Raises:
        UserError: the hole is empty or outside of the picture.
    """
    layout, words = generator.layout, generator.vocabulary
    start, end = hole
    if not 0 <= start < end <= layout.num_codes:
        raise UserError(
            f"The hole [{start}, {end}) does not lie in a picture of {layout.num_codes} codes."
        )
    prompts = [
        sequences.infill_prompt(layout, words, main, start, end, found)
        for main, found in zip(mains, docs, strict=True)
    ]
    longest = 1 + layout.slot + 2 + layout.max_docs * layout.slot
    sampled = _sample(
        generator,
        prompts,
        longest,
        seeds,
        sampling,
        generator.allowed_codes,
        end - start,
        batch_size,
    )
    codes = np.stack([main.codes for main in mains])
    codes[:, start:end] = sampled.tokens - words.code_offset
    return SampledCodes(codes, sampled.log_probs.sum(axis=1))


def best_of(
    draw: Callable[[np.ndarray], SampledCodes],
    score: Callable[[np.ndarray], np.ndarray],
    num_rows: int,
    num_candidates: int,
    seed: int,
) -> np.ndarray:
    """Draws several candidates a row and keeps the one that a retriever likes best.

    Args:
        draw: seeds uint32 [B] -> candidates of all rows.
        score: codes int32 [B, N] -> how well each row's picture fits its text, float [B].
        num_rows: B.
        num_candidates: at least 1; with 1 nothing is scored.
        seed: of the first candidate.

    Returns:
        Codes int32 [B, N].
    """
    candidates = [draw(row_seeds(seed, num_rows, i)).codes for i in range(num_candidates)]
    if num_candidates == 1:
        return candidates[0]
    best = np.argmax([score(codes) for codes in candidates], axis=0)
    return np.stack(candidates)[best, np.arange(num_rows)]


def row_seeds(seed: int, num_rows: int, candidate: int = 0) -> np.ndarray:
    """A seed for each row, uint32 [B], the same in every run."""
    stream = np.random.SeedSequence((seed, candidate))
    return stream.generate_state(num_rows).astype(np.uint32)


def _sample(
    generator: Generator,
    prompts: Sequence[sequences.Prompt],
    length: int,
    seeds: np.ndarray,
    sampling: sampler.Sampling,
    allowed: np.ndarray,
    num_steps: int,
    batch_size: int,
    stop: int | None = None,
) -> sampler.Sampled:
    """In batches of one length, so that a mode compiles once, however many documents are given.

    Fewer prompts than `batch_size` make a batch of their own size, and a program for it.
    """
    if not prompts:
        raise ValueError("there is nothing to sample: give at least one prompt")
    batch_size = min(batch_size, len(prompts))
    found = []
    for first in range(0, len(prompts), batch_size):
        part = list(prompts[first : first + batch_size])
        missing = batch_size - len(part)
        part += part[-1:] * missing
        batch = sampler.Prompts(
            *sequences.stack_prompts(part, length),
            np.array([prompt.next_position for prompt in part], np.int32),
        )
        sampled = sampler.sample(
            generator.params,
            batch,
            np.pad(seeds[first : first + batch_size], (0, missing)).astype(np.uint32),
            allowed,
            graphdef=generator.graphdef,
            num_steps=num_steps,
            sampling=sampling,
            stop=stop,
        )
        found.append([np.asarray(array)[: batch_size - missing] for array in sampled])
    return sampler.Sampled(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def _end(row: np.ndarray, stop: int) -> int:
    stops = np.flatnonzero(row == stop)
    return int(stops[0]) if stops.size else len(row) - 1
