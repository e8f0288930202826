"""CM3 inference tasks: text-to-image generation, captioning and image infilling (docs/papers/ra_cm3.md).

Each task puts the given documents before the prompt, and samples only from the tokens that are valid for its
output.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float32, Int, Int32, UInt32

from rag_mm.core import batches
from rag_mm.core.errors import UserError
from rag_mm.data import sequences, token_documents
from rag_mm.data.vocabulary import Vocabulary
from rag_mm.decode import decode_batch, sampler
from rag_mm.nn.param_trees import Params

Docs = Sequence[token_documents.Example]


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A trained decoder with the vocabulary and the sequence layout it was trained on.

    Attributes:
        graphdef, params: the decoder.
        vocabulary: the ids.
        layout: the capacity of its sequences.
        num_codes_at: number of codes of an image by its height in pixels, for vocabularies with several image
            sizes, the first of which is the default; empty for those with one.
    """

    graphdef: nnx.GraphDef
    params: Params
    vocabulary: Vocabulary
    layout: sequences.Layout
    num_codes_at: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def num_codes(self, image_size: int | None = None) -> int:
        """Number of codes of an image of a height in pixels; None: of the default size.

        Raises:
            UserError: the model has no images of this size.
        """
        sizes = self.vocabulary.image_sizes
        if not sizes:
            if image_size is not None:
                raise UserError(
                    f"image_size is {image_size}, but this model has one image size; leave it out."
                )
            return self.layout.num_codes
        self.vocabulary.size_token(image_size)
        return self.num_codes_at[sizes[0] if image_size is None else image_size]

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
    texts: Sequence[token_documents.Ids],
    docs: Sequence[Docs],
    seeds: UInt32[np.ndarray, " B"],
    sampling: sampler.Sampling,
    batch_size: int | None = None,
    image_size: int | None = None,
) -> SampledCodes:
    """Text to image: exactly `generator.num_codes(image_size)` codes for each text.

    Args:
        generator: the model.
        texts: text token ids of each caption, at most `layout.max_text_len`.
        docs: the documents before each prompt, at most `layout.max_docs`.
        seeds: one per text; an image depends only on its seed, text and documents.
        sampling: temperature and top-p.
        batch_size: examples sampled at once; None: as many as fit into memory (`decode_batch.batch_size`).
        image_size: height and width in pixels, of a model with several sizes; None: the default.

    Raises:
        UserError: more documents than the layout has room for, or the model has no such size.
    """
    layout, vocabulary = generator.layout, generator.vocabulary
    num_codes = generator.num_codes(image_size)
    blank = np.zeros(num_codes, np.int32)
    prompts = [
        sequences.continue_prompt(
            layout, vocabulary, token_documents.pair(text, blank, image_size), 1, text_docs
        )
        for text, text_docs in zip(texts, docs, strict=True)
    ]
    max_prompt_len = layout.prompt_len(layout.max_text_len + 1 + bool(vocabulary.image_sizes))
    sampled = _sample(
        generator,
        prompts,
        max_prompt_len,
        seeds,
        sampling,
        generator.code_mask,
        num_codes,
        batch_size,
    )
    return SampledCodes(sampled.tokens - vocabulary.code_offset, sampled.log_probs.sum(axis=1))


def generate_captions(
    generator: Generator,
    codes: Int[np.ndarray, "B C"],
    docs: Sequence[Docs],
    seeds: UInt32[np.ndarray, " B"],
    sampling: sampler.Sampling,
    batch_size: int | None = None,
) -> tuple[list[str], Float32[np.ndarray, " B"]]:
    """Image to text as infilling: a sentinel replaces the caption, which is generated at the end.

    Args:
        generator: the model.
        codes: the images, of the default size.
        docs, seeds, sampling, batch_size: as for `generate_codes`.

    Returns:
        Captions, and the mean log-probability per token of each, in nats, including the token that ends it;
        exp(-mean) is the perplexity, which compares captions of different lengths.

    Raises:
        UserError: more documents than the layout has room for.
    """
    layout, vocabulary = generator.layout, generator.vocabulary
    # The text is replaced by a sentinel, so any one token will do.
    prompts = [
        sequences.fill_prompt(
            layout, vocabulary, token_documents.pair([0], image_codes), 0, image_docs
        )
        for image_codes, image_docs in zip(codes, docs, strict=True)
    ]
    max_prompt_len = layout.prompt_len(layout.num_codes + 4)  # S0 BRK image EOD S0
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
    mains: Sequence[token_documents.Example],
    holes: Sequence[tuple[int, int]],
    docs: Sequence[Docs],
    seeds: UInt32[np.ndarray, " B"],
    sampling: sampler.Sampling,
    batch_size: int | None = None,
) -> SampledCodes:
    """Fills holes [start, end) in each image's codes, given the codes around them.

    A pyramid has one hole in every grid; they are filled one after the other, coarse to fine.

    Args:
        generator: the model.
        mains: captions and images; their codes inside the holes are ignored.
        holes: start and end of each, ascending and disjoint, in the order of the codes.
        docs, seeds, sampling, batch_size: as for `generate_codes`.

    Returns:
        Codes of the whole images, and the log-probability of the filled holes.

    Raises:
        UserError: a hole is empty or outside the image, there are more holes than masked spans in training,
            or more documents than the layout has room for.
    """
    layout, vocabulary = generator.layout, generator.vocabulary
    codes = np.stack([main.codes for main in mains])
    _check_holes(holes, codes.shape[1], layout.max_spans)
    log_probs = np.zeros(len(mains), np.float32)
    for number, (start, end) in enumerate(holes):
        prompts = [
            sequences.fill_prompt(
                layout,
                vocabulary,
                main.with_codes(main_codes),
                main.find(token_documents.IMAGE),
                main_docs,
                holes,
                num_filled=number,
            )
            for main, main_codes, main_docs in zip(mains, codes, docs, strict=True)
        ]
        sampled = _sample(
            generator,
            prompts,
            layout.prompt_len(layout.slot + 3 * len(holes)),
            seeds,
            sampling,
            generator.code_mask,
            end - start,
            batch_size,
        )
        codes[:, start:end] = sampled.tokens - vocabulary.code_offset
        log_probs += sampled.log_probs.sum(axis=1)
    return SampledCodes(codes, log_probs)


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
    batch_size: int | None,
    stop: int | None = None,
) -> sampler.SampledTokens:
    """Samples in batches padded to one length, so that a task compiles once for any number of documents.

    A last batch is padded to a power of two: with other numbers of prompts few programs are compiled.
    """
    if not prompts:
        raise ValueError("there is nothing to sample: give at least one prompt")
    if batch_size is None:
        config = nnx.merge(generator.graphdef, generator.params).config
        batch_size = decode_batch.batch_size(config, generator.params, max_prompt_len, num_steps)
    sampled = []
    for rows in batches.split(len(prompts), batch_size):
        chunk = [prompts[row] for row in rows]
        batch = sampler.Prompts(
            *sequences.stack_prompts(chunk, max_prompt_len),
            np.array([prompt.next_position for prompt in chunk], np.int32),
        )
        found = sampler.sample(
            generator.params,
            batch,
            np.asarray(seeds)[rows].astype(np.uint32),
            allowed,
            graphdef=generator.graphdef,
            num_steps=num_steps,
            sampling=sampling,
            stop=stop,
        )
        sampled.append(jax.tree.map(np.asarray, found))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(prompts)], *sampled)


def _check_holes(holes: Sequence[tuple[int, int]], num_codes: int, max_spans: int) -> None:
    flat = [edge for hole in holes for edge in hole]
    is_ascending = all(start < end for start, end in holes) and flat == sorted(flat)
    if not flat or not is_ascending or flat[0] < 0 or flat[-1] > num_codes:
        raise UserError(
            f"The holes {list(holes)} are not ranges one after the other inside {num_codes} codes."
        )
    if len(holes) > max_spans:
        raise UserError(
            f"There are {len(holes)} holes, but the model was trained with at most {max_spans} masked spans; "
            "train with a larger masking.max_spans."
        )


def _text_len(tokens: np.ndarray, stop: int) -> int:
    """Tokens before `stop`; without a stop, all but the last one, for which a caption has no room."""
    stops = np.flatnonzero(tokens == stop)
    return int(stops[0]) if stops.size else len(tokens) - 1
