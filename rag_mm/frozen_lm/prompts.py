"""Prompts about images written as words, in the form of SPAE (Yu et al. 2023, arXiv 2306.17842, appendix).

A prompt is a prefix, which several queries may share, and a query whose answer the language model is to
write. All texts are put on one line.
"""

from collections.abc import Sequence
from typing import NamedTuple

CAPTION = "Generate a caption sentence based on words describing an image.\n"
ANSWER = "Answer the question with a single word based on the condition.\n"
NEXT_WORDS = "Learn a new language and predict {count} tokens following the examples.\n"
ALL_AT_ONCE = "Predict the outputs following the examples.\n"


class PromptTexts(NamedTuple):
    """A prefix and the queries behind it; the answer to a query follows with a space before it."""

    prefix: str
    queries: list[str]


class Answered(NamedTuple):
    """A question about an image, written as words, and its answer."""

    words: str
    question: str
    answer: str


class Continued(NamedTuple):
    """A segment of an image's words.

    Attributes:
        condition: what is known of the image, a caption or words.
        before: words of the image before the segment; may be empty.
        segment: the words of the segment; empty in a query.
    """

    condition: str
    before: str
    segment: str = ""


def classification(
    examples: Sequence[tuple[str, str]],
    queries: Sequence[str],
    labels: Sequence[str],
    *,
    repeats: int = 0,
    induction: bool = False,
) -> PromptTexts:
    """Few-shot classification.

    Args:
        examples: (words, label) of each example, in the order of the prompt.
        queries: words of each image to classify.
        labels: all labels, for the line of task induction.
        repeats: how many more times the whole list of examples is shown.
        induction: whether the prompt begins by naming the labels.
    """
    names = " or ".join(f"'{_line(label)}'" for label in labels)
    head = f"For each of the following input output pairs, output is one of [{names}]\n###\n"
    shown = "".join(f"{_input(words)} {_line(label)}\n" for words, label in examples)
    prefix = (head if induction else "") + shown * (repeats + 1)
    return PromptTexts(prefix, [_input(words) for words in queries])


def chosen_label(text: str, labels: Sequence[str]) -> int | None:
    """The number of the longest label that a generated text starts with, in any case; None if none."""
    said = " ".join(text.split()).lower()
    found = [i for i, label in enumerate(labels) if said.startswith(_line(label).lower())]
    return max(found, key=lambda i: len(labels[i]), default=None)


def captioning(examples: Sequence[tuple[str, str]], words: str) -> PromptTexts:
    """Captioning of one image after examples (words, caption)."""
    shown = "".join(f"Q: {_line(w)}\nA: {_line(caption)}\n" for w, caption in examples)
    return PromptTexts(CAPTION + shown, [f"Q: {_line(words)}\nA:"])


def answering(examples: Sequence[Answered], words: str, question: str) -> PromptTexts:
    """A question about one image after examples."""
    shown = "".join(f"{_asked(e.words, e.question)} {_line(e.answer)}\n" for e in examples)
    return PromptTexts(ANSWER + shown, [_asked(words, question)])


def next_words(examples: Sequence[Continued], query: Continued, count: int | None) -> PromptTexts:
    """One segment of an image's words after the same segment of the examples.

    Args:
        examples: pairs of condition and segment.
        query: what is known of the image.
        count: number of words of the segment, if it is one of several that are decoded one after the other;
            None if all segments are decoded at once.
    """
    head = ALL_AT_ONCE if count is None else NEXT_WORDS.format(count=count)
    shown = "".join(f"{_continued(e)} {_line(e.segment)}\n" for e in examples)
    return PromptTexts(head + shown, [_continued(query)])


def first_line(text: str) -> str:
    """The first line of a generated text that is not blank, without white space at its ends."""
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else ""


def _line(text: str) -> str:
    return " ".join(text.split())


def _input(words: str) -> str:
    return f"Input: {_line(words)}\nOutput:"


def _asked(words: str, question: str) -> str:
    return f"C: {_line(words)}\nQ: {_line(question)}\nA:"


def _continued(part: Continued) -> str:
    before = f"Q: {_line(part.before)}\n" if part.before else ""
    return f"C: {_line(part.condition)}\n{before}A:"
