"""Training sequences of instruction tuning: a mixture of tasks, their answers masked (CM3Leon, section 4)."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import grain
import numpy as np

from rag_mm.core import image_files
from rag_mm.data import (
    instruction_items,
    instruction_templates,
    packing,
    pipeline,
    sequences,
)
from rag_mm.data.instruction_items import CodedItem, Instruction, InstructionItem
from rag_mm.data.token_documents import Example
from rag_mm.data.vocabulary import Vocabulary
from rag_mm.stages.ra_cm3 import drawn_sequences

_BATCH = 256


@dataclasses.dataclass(frozen=True, eq=False)
class TaskData:
    """The examples of one task.

    Attributes:
        items: what is given and wanted.
        documents: for each item, memory rows of retrieved documents that may be read, int32 [K] each.
        num_docs_weights: relative frequencies of 0, 1, .. retrieved documents.
        share: of all sequences, in 0..1.
    """

    items: Sequence[CodedItem]
    documents: Sequence[np.ndarray]
    num_docs_weights: tuple[float, ...]
    share: float

    @property
    def num_given(self) -> int:
        """Pictures given besides the main one."""
        return len(self.items[0].given)


@dataclasses.dataclass(frozen=True, eq=False)
class InstructionSource:
    """Makes training sequences of several tasks.

    The answer of an instruction is always masked, and with `text_mask_prob` the whole main text of the
    others, as in the null prompts that guidance reads.

    Attributes:
        tasks: the examples of each task, by its name or the place of its files.
        memory: documents that may be retrieved.
        layout: of the decoder.
        vocabulary: the ids.
        text_mask_prob: probability of masking the main text of an example that asks for a picture.
        code_noise: probability of replacing an input code of a main picture that is asked for.
        mean_doc_text_len: tokens reserved in slots per text of a retrieved document; the rare sequence that
            needs more loses its first document.
    """

    tasks: Mapping[str, TaskData]
    memory: Sequence[Example]
    layout: sequences.Layout
    vocabulary: Vocabulary
    text_mask_prob: float
    code_noise: float
    mean_doc_text_len: int

    @functools.cached_property
    def shares_by_docs(self) -> list[dict[str, float]]:
        """The share of each task among all sequences, by the number of documents before the main one."""
        shares: list[dict[str, float]] = [{} for _ in range(self.layout.max_docs + 1)]
        for name, data in self.tasks.items():
            weights = np.array(data.num_docs_weights)
            for count, weight in enumerate(weights / weights.sum()):
                if weight:
                    shares[data.num_given + count][name] = data.share * float(weight)
        return shares

    def make(
        self, index: np.int64, rng: np.random.Generator, num_docs: int | None
    ) -> dict[str, np.ndarray]:
        """One sequence, as arrays [T] by batch field.

        Args:
            index: not used: all choices are the generator's.
            rng: chooses the task, the example, the wording and the documents.
            num_docs: documents before the main one, retrieved and given; T is `length(num_docs)`. None: drawn
                like the task, and T is the sequence's own length.
        """
        shares = self.shares_by_docs
        if num_docs is None:
            sums = np.array([sum(each.values()) for each in shares])
            count = int(rng.choice(len(sums), p=sums / sums.sum()))
        else:
            count = num_docs
        names = list(shares[count])
        weights = np.array([shares[count][name] for name in names])
        name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        length = self.layout.length if num_docs is None else self.length(num_docs)
        instruction, plain = self._draw(self.tasks[name], count, rng, length)
        spans = None
        if instruction.answer is not None:
            spans = instruction_items.answer_span(plain, instruction)
        elif rng.random() < self.text_mask_prob:
            spans = instruction_items.text_span(plain, instruction)
        masked = sequences.mask(self.layout, self.vocabulary, plain, spans)
        row = sequences.as_row(self.vocabulary, masked, None if num_docs is None else length)
        if instruction.answer is None:
            drawn_sequences.add_code_noise(row, self.vocabulary, self.code_noise, rng)
        return row

    def _draw(
        self, data: TaskData, count: int, rng: np.random.Generator, length: int
    ) -> tuple[Instruction, sequences.Tokens]:
        """An example with at most `count` documents, and its unmasked sequence of at most `length` tokens."""
        number = int(rng.integers(len(data.items)))
        item, rows = data.items[number], data.documents[number]
        kept = rng.permutation(rows[rows >= 0])[: count - data.num_given]
        documents = [self.memory[row] for row in kept]
        templates = instruction_templates.TEMPLATES[item.task]
        template = templates[int(rng.integers(len(templates)))]
        while True:
            made = instruction_items.instruct(
                self.vocabulary, template, item, self.layout.max_text_len, documents
            )
            plain = sequences.lay_out(self.layout, self.vocabulary, made.main, made.docs)
            if len(plain.tokens) + 3 <= length or not documents:
                return made, plain
            documents = documents[1:]

    def length(self, num_docs: int) -> int:
        """Length in tokens of a slots sequence with `num_docs` documents, chosen for little padding.

        Masking adds three tokens for its one span.
        """
        layout = self.layout
        document = layout.slot - layout.max_text_len + self.mean_doc_text_len
        return 1 + layout.slot + 3 + num_docs * document

    @property
    def mean_length(self) -> float:
        """Mean length of a row in tokens, including padding."""
        if self.layout.kind == sequences.PACKED:
            return float(self.layout.max_seq_len)
        shares = [sum(each.values()) for each in self.shares_by_docs]
        return float(sum(s * self.length(count) for count, s in enumerate(shares)) / sum(shares))

    def batches(
        self, batch_size: int, seed: int, rows: range | None = None, num_workers: int = 0
    ) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        """Endless batches; arguments as of `training_sequences.SequenceSource.batches`."""
        numbers = np.arange(max(batch_size, sum(len(data.items) for data in self.tasks.values())))
        if self.layout.kind == sequences.PACKED:
            pad = self.vocabulary.pad
            return packing.make_packed_batches(
                numbers,
                batch_size,
                seed,
                functools.partial(self.make, num_docs=None),
                self.layout.max_seq_len,
                padding={"tokens": pad, "targets": pad},
                rows=rows,
                num_workers=num_workers,
            )
        shares = [sum(each.values()) for each in self.shares_by_docs]
        used = [count for count, share in enumerate(shares) if share]
        return pipeline.make_batches(
            numbers,
            batch_size,
            seed,
            *(functools.partial(self.make, num_docs=count) for count in used),
            shares=[shares[count] for count in used],
            rows=rows,
            num_workers=num_workers,
        )


def given_lengths(
    tasks: Mapping[str, TaskData], layout: sequences.Layout, vocabulary: Vocabulary
) -> Iterator[int]:
    """Numbers of tokens of the texts of given pictures."""
    for data in tasks.values():
        for template in instruction_templates.TEMPLATES[data.items[0].task]:
            for text in template.given:
                # Without a field it is the same for all items.
                for item in data.items if "{" in text else data.items[:1]:
                    word = instruction_items.word(
                        vocabulary, text, item.fields, layout.max_text_len
                    )
                    yield len(word.ids)


def encode(
    items: Iterable[InstructionItem], tokenize: Callable[[np.ndarray], np.ndarray], image_size: int
) -> Iterator[CodedItem]:
    """The items with codes for pixels; a picture that several of a batch show is encoded once.

    Args:
        items: any number of them; pictures are scaled to `image_size`.
        tokenize: images uint8 [B, S, S, 3] -> codes int32 [B, N].
        image_size: S.
    """
    batch: list[InstructionItem] = []
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH:
            yield from _encode_batch(batch, tokenize, image_size)
            batch = []
    if batch:
        yield from _encode_batch(batch, tokenize, image_size)


def _encode_batch(
    batch: Sequence[InstructionItem],
    tokenize: Callable[[np.ndarray], np.ndarray],
    image_size: int,
) -> Iterator[CodedItem]:
    pictures = [
        image_files.fit(picture, image_size)
        for item in batch
        for picture in (*item.given, item.picture)
    ]
    unique = {picture.tobytes(): picture for picture in pictures}
    found = dict(zip(unique, tokenize(np.stack(list(unique.values()))), strict=True))
    codes = iter([found[picture.tobytes()] for picture in pictures])
    for item in batch:
        given = tuple(next(codes) for _ in item.given)
        yield CodedItem(item.task, item.fields, next(codes), given)
