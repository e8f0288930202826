"""Answers about pictures: a span of the text before a picture is written, as CM3 fills in spans."""

from collections.abc import Sequence

import numpy as np
from flax import nnx
from jaxtyping import Float32, UInt32

from rag_mm.core import batches
from rag_mm.data import instruction_items, sequences
from rag_mm.data.instruction_items import Instruction
from rag_mm.decode import decode_batch, sampler, tasks
from rag_mm.decode.tasks import Generator


def generate_answers(
    generator: Generator,
    instructions: Sequence[Instruction],
    seeds: UInt32[np.ndarray, " B"],
    sampling: sampler.Sampling,
    batch_size: int | None = None,
) -> tuple[list[str], Float32[np.ndarray, " B"]]:
    """Writes the answer of each instruction, in at most `layout.max_text_len` tokens.

    Args:
        generator: the model.
        instructions: with an answer, whose ids do not matter; at least one.
        seeds: one per instruction.
        sampling: temperature and top-p.
        batch_size: instructions answered at once; None: as many as fit into memory.

    Returns:
        Answers, and the mean log-probability per token of each, in nats, including the token that ends it.

    Raises:
        ValueError: there is no instruction, or one asks for a picture.
    """
    if not instructions or any(each.answer is None for each in instructions):
        raise ValueError("give at least one instruction, and only those that ask for a text")
    layout, vocabulary = generator.layout, generator.vocabulary
    prompts = [instruction_items.prompt(layout, vocabulary, each) for each in instructions]
    # Text with S0, BRK, image, EOD, S0.
    max_prompt_len = layout.prompt_len(layout.max_text_len + layout.num_codes + 3)
    allowed = generator.token_mask(slice(vocabulary.text_size), vocabulary.eoss)
    num_steps = layout.max_text_len + 1
    if batch_size is None:
        config = nnx.merge(generator.graphdef, generator.params).config
        batch_size = decode_batch.batch_size(config, generator.params, max_prompt_len, num_steps)
    rows: list[np.ndarray] = []
    sums: list[float] = []
    for chosen in batches.split(len(prompts), batch_size):
        chunk = [prompts[i] for i in chosen]
        following = np.array([prompt.next_position for prompt in chunk], np.int32)
        stacked = sequences.stack_prompts(chunk, max_prompt_len)
        found = sampler.sample(
            generator.params,
            sampler.Prompts(*stacked, following),
            np.asarray(seeds)[chosen].astype(np.uint32),
            allowed,
            graphdef=generator.graphdef,
            num_steps=num_steps,
            sampling=sampling,
            stop=vocabulary.eoss,
        )
        rows += list(np.asarray(found.tokens))
        sums += np.asarray(found.log_probs).sum(axis=1).tolist()
    lengths = [tasks.text_len(row, vocabulary.eoss) for row in rows[: len(prompts)]]
    texts = [
        vocabulary.decode_text(row[:length].tolist()).strip()
        for row, length in zip(rows, lengths, strict=False)
    ]
    return texts, np.array(sums[: len(prompts)], np.float32) / (np.array(lengths, np.float32) + 1)
