"""Instructions with their answers, and the sequences and prompts that they become (CM3Leon, Table 5).

Every task has one form: pictures that are given, a text, and a picture. What is wanted is the picture, or a
part of the text, the answer, which stands before the picture it is about and is filled in like any masked
span.

    EOD (text BRK picture BRK)xK   text edit BRK source BRK   change the background to red BRK target EOD
        retrieved documents        given pictures             main document

Retrieved documents and given pictures are documents before the main one, so that in slots each picture is at
a constant offset from the main one (docs/sequences.md).
"""

import dataclasses
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rag_mm.data import sequences, token_documents
from rag_mm.data.token_documents import TEXT, Example
from rag_mm.data.vocabulary import Vocabulary

ANSWER = "answer"  # The field that is to be written, where a text is wanted.
CUT = "cut"  # The mark of fields that are shortened to fit: {name:cut}.


@dataclasses.dataclass(frozen=True, eq=False)
class InstructionItem:
    """One instruction with its answer; pictures are uint8 [H, W, 3].

    Attributes:
        id: unique within its source.
        task: by which templates it is worded, a key of `instruction_templates.TEMPLATES`.
        fields: the words that fill a template, by name, and whatever else is known in words. A text is wanted
            if there is an `ANSWER` among them.
        picture: the picture that is wanted, or that a text is about.
        given: what is given besides: the picture to edit, a second one, or a structure, in order.
        answers: all accepted answers, or references, in words.
    """

    id: str
    task: str
    fields: Mapping[str, str]
    picture: np.ndarray
    given: tuple[np.ndarray, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def wants_text(self) -> bool:
        """Whether a text is wanted."""
        return ANSWER in self.fields


@dataclasses.dataclass(frozen=True, eq=False)
class CodedItem:
    """What a sequence is made of: the words of an item, and the codes of its pictures, each int32 [N]."""

    task: str
    fields: Mapping[str, str]
    codes: np.ndarray
    given: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class Template:
    """A wording: format strings over an item's fields.

    A field with the mark `CUT` loses words at its end where a text is too long; without it, only if there are
    no others.

    Attributes:
        text: of the main document, before its picture.
        given: of the given pictures, before each.
    """

    text: str
    given: tuple[str, ...] = ()


class Wording(NamedTuple):
    """Ids of a filled format string, the range of the answer in them or None, and how many were cut off."""

    ids: list[int]
    answer: tuple[int, int] | None
    num_cut: int


class Instruction(NamedTuple):
    """The documents of a sequence.

    Attributes:
        main: text and picture.
        docs: what comes before it, in order.
        answer: range [start, end) of the answer in the ids of the main text; None if the picture is wanted.
    """

    main: Example
    docs: tuple[Example, ...]
    answer: tuple[int, int] | None


class _Part(NamedTuple):
    text: str
    field: str | None
    may_be_cut: bool


def word(vocabulary: Vocabulary, text: str, fields: Mapping[str, str], max_len: int) -> Wording:
    """Fills a format string with fields, in at most `max_len` tokens.

    The answer is the last part: in slots, the positions of what came after it would tell its length.

    Raises:
        ValueError: a field is missing, the answer is not last, or there are more parts than tokens.
    """
    parts = list(_parts(text, fields))
    if ANSWER in [part.field for part in parts[:-1]]:
        raise ValueError(f"{text!r} goes on after the answer")
    ids = [vocabulary.encode_text(part.text) for part in parts]
    excess = num_cut = max(0, sum(map(len, ids)) - max_len)
    # The answer is the last of the fields that may be cut.
    order = sorted(
        range(len(parts)),
        key=lambda i: (not parts[i].may_be_cut, parts[i].field == ANSWER, -len(ids[i])),
    )
    for i in order:
        taken = min(excess, len(ids[i]) - 1)
        ids[i], excess = ids[i][: len(ids[i]) - taken], excess - taken
    if excess:
        raise ValueError(f"{text!r} does not fit {max_len} tokens")
    answer, end = None, 0
    for part, own in zip(parts, ids, strict=True):
        if part.field == ANSWER:
            answer = (end, end + len(own))
        end += len(own)
    return Wording([i for own in ids for i in own], answer, num_cut)


def fill(text: str, fields: Mapping[str, str]) -> str:
    """A format string filled with fields, none of which is cut; ValueError if one is missing."""
    return "".join(part.text for part in _parts(text, fields))


def _parts(text: str, fields: Mapping[str, str]) -> Iterator[_Part]:
    """The literal texts and fields of a format string, none empty.

    A space belongs to the word after it, as in the tokens of a vocabulary, but for the one before the answer:
    an answer has the tokens that its words have at the beginning of a document's text, from which it may be
    copied.
    """
    space, is_first = "", True
    for literal, name, mark, _ in string.Formatter().parse(text):
        pieces: list[tuple[str, str | None, bool]] = [(literal, None, False)]
        if name is not None:
            if name not in fields:
                raise ValueError(
                    f"{text!r} has a field {name!r}, which is none of {sorted(fields)}"
                )
            pieces.append((fields[name], name, mark == CUT))
        for piece, field, may_be_cut in pieces:
            if field == ANSWER and space and not is_first:
                yield _Part(space, None, False)
                space = ""
            whole = space + piece
            kept = whole.rstrip(" ")
            space = whole[len(kept) :]
            kept = kept.lstrip(" ") if is_first else kept
            if kept:
                is_first = False
                yield _Part(kept, field, may_be_cut)


def instruct(
    vocabulary: Vocabulary,
    template: Template,
    item: CodedItem,
    max_text_len: int,
    documents: Sequence[Example] = (),
) -> Instruction:
    """Words an item.

    Args:
        vocabulary: the ids.
        template: the wording.
        item: words and codes.
        max_text_len: maximum number of tokens of each text.
        documents: retrieved documents, which come first.

    Raises:
        ValueError: the template is for another number of given pictures, or lacks a field.
    """
    wording = word(vocabulary, template.text, item.fields, max_text_len)
    given = []
    for text, codes in zip(template.given, item.given, strict=True):
        ids, _, num_cut = word(vocabulary, text, item.fields, max_text_len)
        given.append(token_documents.pair(ids, codes, num_cut=num_cut))
    main = token_documents.pair(wording.ids, item.codes, num_cut=wording.num_cut)
    return Instruction(main, (*documents, *given), wording.answer)


def answer_span(plain: sequences.Tokens, instruction: Instruction) -> np.ndarray:
    """The answer as a span of an instruction's sequence `plain`, int32 [1, 2]; ValueError without one."""
    if instruction.answer is None:
        raise ValueError("the instruction asks for a picture")
    first = plain.main[instruction.main.find(TEXT), 0]
    return np.array([instruction.answer], np.int32) + first


def text_span(plain: sequences.Tokens, instruction: Instruction) -> np.ndarray:
    """The whole main text as a span of the sequence `plain`, int32 [1, 2], or [0, 2] if it is empty."""
    span = plain.main[instruction.main.find(TEXT)][None].astype(np.int32)
    return span[span[:, 0] < span[:, 1]]


def prompt(
    layout: sequences.Layout, vocabulary: Vocabulary, instruction: Instruction
) -> sequences.Prompt:
    """What the model continues with the answer, and `EOSS`, or with the picture's codes.

    The ids of the answer, or the codes of the main picture, do not matter where they are wanted.
    """
    main, docs, answer = instruction
    if answer is None:
        return sequences.continue_prompt(layout, vocabulary, main, 1, docs)
    start, _ = answer
    # In the place of the answer is a sentinel, so that any one token will do.
    asked = main.with_text([*main.text[:start], 0])
    return sequences.fill_prompt(layout, vocabulary, asked, 0, docs, [(start, start + 1)])
