"""CM3 inference tasks: text-to-image generation, captioning and image infilling (docs/papers/ra_cm3.md).

Each task puts the given documents before the prompt, and samples only from the tokens that are valid for its
output. Images may be steered away from a null prompt (docs/papers/cm3leon.md).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float32, Int, Int32, UInt32

from rag_mm.core import batches
from rag_mm.core.errors import UserError
from rag_mm.data import sequences, token_documents
from rag_mm.data.vocabulary import Vocabulary
from rag_mm.decode import (
    contrastive_decoding,
    decode_batch,
    guidance,
    jacobi,
    sampler,
    token_choice,
)
from rag_mm.nn.param_trees import Params

Docs = Sequence[token_documents.Example]
Steering = guidance.Guidance | contrastive_decoding.Contrast
SEQUENTIAL, JACOBI, JACOBI_UNCOUPLED = "sequential", "jacobi", "jacobi_uncoupled"
DECODINGS = (SEQUENTIAL, JACOBI, JACOBI_UNCOUPLED)


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A trained decoder with the vocabulary and the sequence layout it was trained on.

    Attributes:
        graphdef, params: the decoder.
        vocabulary: the ids.
        layout: the capacity of its sequences.
        num_codes_at: number of codes of an image by its height in pixels, for vocabularies with several image
            sizes, the first of which is the default; empty for those with one.
        null_prompts: those that training showed it (`guidance.NULLS`); others cannot steer it.
    """

    graphdef: nnx.GraphDef
    params: Params
    vocabulary: Vocabulary
    layout: sequences.Layout
    num_codes_at: Mapping[int, int] = dataclasses.field(default_factory=dict)
    null_prompts: frozenset[str] = frozenset()

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
    """Codes of the codebook, and the log-probability of each example's sampled codes in nats.

    Attributes:
        codes: of whole images.
        log_probs: of those that were sampled, under the steered logits where there is steering.
        passes: how many times the decoder ran for each image after its prompt; None for infilling.
    """

    codes: Int32[np.ndarray, "B C"]
    log_probs: Float32[np.ndarray, " B"]
    passes: Int32[np.ndarray, " B"] | None = None


def generate_codes(
    generator: Generator,
    texts: Sequence[token_documents.Ids],
    docs: Sequence[Docs],
    seeds: UInt32[np.ndarray, " B"],
    sampling: sampler.Sampling,
    batch_size: int | None = None,
    image_size: int | None = None,
    steering: Steering | None = None,
    decoding: str = SEQUENTIAL,
) -> SampledCodes:
    """Text to image: exactly `generator.num_codes(image_size)` codes for each text.

    Args:
        generator: the model.
        texts: text token ids of each caption, at most `layout.max_text_len`.
        docs: the documents before each prompt, at most `layout.max_docs`.
        seeds: one per text; an image depends only on its seed, text and documents.
        sampling: temperature and top-p, of the steered logits.
        batch_size: examples sampled at once; None: as many as fit into memory (`decode_batch.batch_size`).
        image_size: height and width in pixels, of a model with several sizes; None: the default.
        steering: guidance or contrastive decoding; None: the model's own distribution.
        decoding: sequential, code by code; or jacobi, many codes a pass with the same distribution, and the
            same codes if greedy (`decode.jacobi`); jacobi_uncoupled, to compare with.

    Raises:
        UserError: more documents than the layout has room for, the model has no such size, its training never
            showed it a null prompt that steers it, or `decoding` is another word.
    """
    if decoding not in DECODINGS:
        raise UserError(f"decoding is {decoding!r}; give one of {', '.join(DECODINGS)}.")
    layout, vocabulary = generator.layout, generator.vocabulary
    streams = (guidance.FULL,) if steering is None else steering.streams
    read = {guidance.null_read(stream, bool(own)) for own in docs for stream in streams}
    guidance.check_shown(sorted(read), generator.null_prompts)
    num_codes = generator.num_codes(image_size)
    blank = np.zeros(num_codes, np.int32)
    pairs = [token_documents.pair(text, blank, image_size) for text in texts]
    max_prompt_len = layout.prompt_len(layout.max_text_len + 1 + bool(vocabulary.image_sizes))
    sampled, passes = _sample(
        generator,
        [_image_prompts(generator, pairs, docs, stream) for stream in streams],
        max_prompt_len,
        seeds,
        sampling,
        generator.code_mask,
        num_codes,
        batch_size,
        combine=None if steering is None else steering.combine(),
        decoding=decoding,
    )
    codes = sampled.tokens - vocabulary.code_offset
    return SampledCodes(codes, sampled.log_probs.sum(axis=1), passes)


def _image_prompts(
    generator: Generator, pairs: Docs, docs: Sequence[Docs], stream: str
) -> list[sequences.Prompt]:
    """What one stream reads before the image of each pair."""
    masked = (0,) if stream in (guidance.DOCUMENTS, guidance.BARE) else ()
    reads_docs = stream in (guidance.FULL, guidance.DOCUMENTS)
    return [
        sequences.continue_prompt(
            generator.layout, generator.vocabulary, main, 1, main_docs if reads_docs else (), masked
        )
        for main, main_docs in zip(pairs, docs, strict=True)
    ]


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
    sampled, _ = _sample(
        generator,
        [prompts],
        max_prompt_len,
        seeds,
        sampling,
        generator.token_mask(slice(vocabulary.text_size), vocabulary.eoss),
        layout.max_text_len + 1,
        batch_size,
        stop=vocabulary.eoss,
    )
    lengths = [text_len(tokens, vocabulary.eoss) for tokens in sampled.tokens]
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
        sampled, _ = _sample(
            generator,
            [prompts],
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
    streams: Sequence[Sequence[sequences.Prompt]],
    max_prompt_len: int,
    seeds: np.ndarray,
    sampling: sampler.Sampling,
    allowed: np.ndarray,
    num_steps: int,
    batch_size: int | None,
    stop: int | None = None,
    combine: token_choice.Combine | None = None,
    decoding: str = SEQUENTIAL,
) -> tuple[sampler.SampledTokens, Int32[np.ndarray, " B"]]:
    """Samples in batches padded to one length, so that a task compiles once for any number of documents.

    A last batch is padded to a power of two: with other numbers of prompts few programs are compiled.

    Returns:
        The tokens, and the number of times the decoder ran for each prompt after reading it, at most.
    """
    num_prompts = len(streams[0])
    if not num_prompts:
        raise ValueError("there is nothing to sample: give at least one prompt")
    if batch_size is None:
        config = nnx.merge(generator.graphdef, generator.params).config
        num_drafts = 1 if decoding == SEQUENTIAL else num_steps
        batch_size = decode_batch.batch_size(
            config, generator.params, max_prompt_len, num_steps, len(streams), num_drafts
        )
    how = dict(graphdef=generator.graphdef, num_steps=num_steps, sampling=sampling, combine=combine)
    sampled = []
    for rows in batches.split(num_prompts, batch_size):
        prompts = [_stack([stream[row] for row in rows], max_prompt_len) for stream in streams]
        chosen = np.asarray(seeds)[rows].astype(np.uint32)
        if decoding != SEQUENTIAL:
            is_coupled = decoding == JACOBI
            found = jacobi.sample(
                generator.params, prompts, chosen, allowed, is_coupled=is_coupled, **how
            )
        else:
            passes = np.full(len(rows), num_steps - 1, np.int32)
            found = (
                sampler.sample(generator.params, prompts, chosen, allowed, stop=stop, **how),
                passes,
            )
        sampled.append(jax.tree.map(np.asarray, found))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:num_prompts], *sampled)


def _stack(prompts: Sequence[sequences.Prompt], length: int) -> sampler.Prompts:
    """Prompts as one batch, padded to one length."""
    following = np.array([prompt.next_position for prompt in prompts], np.int32)
    return sampler.Prompts(*sequences.stack_prompts(prompts, length), following)


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


def text_len(tokens: Int32[np.ndarray, " T"], stop: int) -> int:
    """Tokens before `stop`; without a stop, all but the last one, for which a caption has no room."""
    stops = np.flatnonzero(tokens == stop)
    return int(stops[0]) if stops.size else len(tokens) - 1
