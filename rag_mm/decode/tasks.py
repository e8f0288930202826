"""CM3 inference tasks: text-to-image generation, captioning and image infilling (docs/papers/ra_cm3.md).

Each task puts the given documents before the prompt, and samples only from the tokens that are valid for its
output.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Bool, Float32, Int, Int32, UInt32

from rag_mm.core.errors import UserError
from rag_mm.data import sequences
from rag_mm.data.vocabulary import Vocabulary
from rag_mm.decode import sampler
from rag_mm.nn.param_trees import Params

Docs = Sequence[sequences.Example]


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A trained decoder with the vocabulary and the sequence layout it was trained on."""

    graphdef: nnx.GraphDef
    params: Params
    vocabulary: Vocabulary
    layout: sequences.Layout

    def token_mask(self, *ids: slice | int) -> Bool[np.ndarray, " V"]:
        """True at these ids; V is the size of the token table, at least that of the vocabulary."""
        mask = np.zeros(self.params["embedding"]["table"].shape[0], bool)
        for selection in ids:
            mask[selection] = True
        return mask

    @property
    def code_mask(self) -> Bool[np.ndarray, " V"]:
        """True at the image codes."""
        start = self.vocabulary.code_offset
        return self.token_mask(slice(start, start + self.vocabulary.codebook_size))


class SampledCodes(NamedTuple):
    """Codes of the codebook, and the log-probability of each example's sampled codes in nats."""

    codes: Int32[np.ndarray, "B C"]
    log_probs: Float32[np.ndarray, " B"]


def generate_codes(
    generator: Generator,
    texts: Sequence[Sequence[int]],
    docs: Sequence[Docs],
    seeds: UInt32[np.ndarray, " B"],
    sampling: sampler.Sampling,
    batch_size: int = 64,
) -> SampledCodes:
    """Text to image: exactly `layout.num_codes` codes for each text.

    Args:
        generator: the model.
        texts: text token ids of each caption, at most `layout.max_text_len`.
        docs: the documents before each prompt, at most `layout.max_docs`.
        seeds: one per text; an image depends only on its seed, text and documents.
        sampling: temperature and top-p.
        batch_size: examples sampled at once.

    Raises:
        UserError: more documents than the layout has room for.
    """
    layout, vocabulary = generator.layout, generator.vocabulary
    prompts = [
        sequences.caption_to_image_prompt(layout, vocabulary, text, text_docs)
        for text, text_docs in zip(texts, docs, strict=True)
    ]
    max_prompt_len = 1 + layout.max_text_len + 1 + layout.max_docs * layout.slot
    sampled = _sample(
        generator,
        prompts,
        max_prompt_len,
        seeds,
        sampling,
        generator.code_mask,
        layout.num_codes,
        batch_size,
    )
    return SampledCodes(sampled.tokens - vocabulary.code_offset, sampled.log_probs.sum(axis=1))


def generate_captions(
    generator: Generator,
    codes: Int[np.ndarray, "B C"],
    docs: Sequence[Docs],
    seeds: UInt32[np.ndarray, " B"],
    sampling: sampler.Sampling,
    batch_size: int = 64,
) -> tuple[list[str], Float32[np.ndarray, " B"]]:
    """Image to text as infilling: a sentinel replaces the caption, which is generated at the end.

    Args:
        generator: the model.
        codes: the images; C is `layout.num_codes`.
        docs, seeds, sampling, batch_size: as for `generate_codes`.

    Returns:
        Captions, and the mean log-probability per token of each, in nats, including the token that ends it;
        exp(-mean) is the perplexity, which compares captions of different lengths.

    Raises:
        UserError: more documents than the layout has room for.
    """
    layout, vocabulary = generator.layout, generator.vocabulary
    prompts = [
        sequences.image_to_caption_prompt(layout, vocabulary, image_codes, image_docs)
        for image_codes, image_docs in zip(codes, docs, strict=True)
    ]
    max_prompt_len = 1 + 1 + 1 + layout.num_codes + 1 + 1 + layout.max_docs * layout.slot
    sampled = _sample(
        generator,
        prompts,
        max_prompt_len,
        seeds,
        sampling,
        generator.token_mask(slice(vocabulary.text_size), vocabulary.eoss),
        layout.max_text_len + 1,
        batch_size,
        stop=vocabulary.eoss,
    )
    lengths = [_text_len(tokens, vocabulary.eoss) for tokens in sampled.tokens]
    captions = [
        vocabulary.decode_text(tokens[:length])
        for tokens, length in zip(sampled.tokens, lengths, strict=True)
    ]
    num_tokens = np.array(lengths, np.float32) + 1
    return captions, sampled.log_probs.sum(axis=1) / num_tokens


def infill_codes(
    generator: Generator,
    mains: Sequence[sequences.Example],
    hole: tuple[int, int],
    docs: Sequence[Docs],
    seeds: UInt32[np.ndarray, " B"],
    sampling: sampler.Sampling,
    batch_size: int = 64,
) -> SampledCodes:
    """Fills the hole [start, end) of each image's codes, given the codes before and after it.

    Args:
        generator: the model.
        mains: captions and images; their codes inside the hole are ignored.
        hole: start and end, in raster order.
        docs, seeds, sampling, batch_size: as for `generate_codes`.

    Returns:
        Codes of the whole images, and the log-probability of each filled hole.

    Raises:
        UserError: the hole is empty or outside the image, or there are more documents than the layout has
            room for.
    """
    layout, vocabulary = generator.layout, generator.vocabulary
    start, end = hole
    if not 0 <= start < end <= layout.num_codes:
        raise UserError(
            f"The hole [{start}, {end}) is not inside an image of {layout.num_codes} codes."
        )
    prompts = [
        sequences.infill_prompt(layout, vocabulary, main, start, end, main_docs)
        for main, main_docs in zip(mains, docs, strict=True)
    ]
    max_prompt_len = 1 + layout.slot + 2 + layout.max_docs * layout.slot
    sampled = _sample(
        generator,
        prompts,
        max_prompt_len,
        seeds,
        sampling,
        generator.code_mask,
        end - start,
        batch_size,
    )
    codes = np.stack([main.codes for main in mains])
    codes[:, start:end] = sampled.tokens - vocabulary.code_offset
    return SampledCodes(codes, sampled.log_probs.sum(axis=1))


def best_of(
    generate: Callable[[UInt32[np.ndarray, " B"]], SampledCodes],
    score: Callable[[Int32[np.ndarray, "B C"]], np.ndarray],
    num_examples: int,
    num_candidates: int,
    seed: int,
) -> Int32[np.ndarray, "B C"]:
    """Generates several candidates per example and keeps the one with the highest score.

    Args:
        generate: seeds -> one candidate per example.
        score: codes -> how well each image matches its text, float [B].
        num_examples: B.
        num_candidates: at least 1; with 1, `score` is not called.
        seed: determines the seeds of all candidates.
    """
    candidates = [generate(make_seeds(seed, num_examples, i)).codes for i in range(num_candidates)]
    if num_candidates == 1:
        return candidates[0]
    best = np.argmax([score(codes) for codes in candidates], axis=0)
    return np.stack(candidates)[best, np.arange(num_examples)]


def make_seeds(seed: int, num_examples: int, candidate: int = 0) -> UInt32[np.ndarray, " B"]:
    """A reproducible seed for each example; those of the first B do not depend on B.

    Raises:
        UserError: `seed` is not an integer of at least 0.
    """
    sampler.check_seed(seed)
    stream = np.random.SeedSequence((seed, candidate))
    return stream.generate_state(num_examples).astype(np.uint32)


def _sample(
    generator: Generator,
    prompts: Sequence[sequences.Prompt],
    max_prompt_len: int,
    seeds: np.ndarray,
    sampling: sampler.Sampling,
    allowed: np.ndarray,
    num_steps: int,
    batch_size: int,
    stop: int | None = None,
) -> sampler.SampledTokens:
    """Samples in batches padded to one length, so that a task compiles once for any number of documents.

    Fewer prompts than `batch_size` are one batch of their number, which compiles a program of its own.
    """
    if not prompts:
        raise ValueError("there is nothing to sample: give at least one prompt")
    batch_size = min(batch_size, len(prompts))
    batches = []
    for first in range(0, len(prompts), batch_size):
        chunk = list(prompts[first : first + batch_size])
        num_padded = batch_size - len(chunk)
        chunk += chunk[-1:] * num_padded
        batch = sampler.Prompts(
            *sequences.stack_prompts(chunk, max_prompt_len),
            np.array([prompt.next_position for prompt in chunk], np.int32),
        )
        sampled = sampler.sample(
            generator.params,
            batch,
            np.pad(seeds[first : first + batch_size], (0, num_padded)).astype(np.uint32),
            allowed,
            graphdef=generator.graphdef,
            num_steps=num_steps,
            sampling=sampling,
            stop=stop,
        )
        batches.append([np.asarray(array)[: batch_size - num_padded] for array in sampled])
    return sampler.SampledTokens(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))


def _text_len(tokens: np.ndarray, stop: int) -> int:
    """Tokens before `stop`; without a stop, all but the last one, for which a caption has no room."""
    stops = np.flatnonzero(tokens == stop)
    return int(stops[0]) if stops.size else len(tokens) - 1
