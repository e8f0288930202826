"""What a frozen language model does with images written as words: captions, answers and new images (SPAE)."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rag_mm.core import code_grids, image_files, progress
from rag_mm.core.document_types import Document
from rag_mm.core.errors import UserError
from rag_mm.frozen_lm import denoising, progressive, prompts
from rag_mm.frozen_lm.denoising import CodePair
from rag_mm.frozen_lm.lm_protocol import FrozenLM
from rag_mm.frozen_lm.progressive import ProgressiveConfig
from rag_mm.frozen_lm.word_text import WordTable
from rag_mm.stages.spae import word_images

TEXT_TO_IMAGE = "text-to-image"
TASKS = (*denoising.CONDITIONS, TEXT_TO_IMAGE)
ANSWER_TOKENS = 32
_PROGRESSIVE = ProgressiveConfig()


@dataclasses.dataclass(frozen=True, eq=False)
class Completed:
    """An image completed by a language model and, beside it, by a majority vote.

    Attributes:
        given: the image that was given, uint8 [S, S, 3]; None for `text-to-image`.
        wanted: the image that was wanted, as its own codes decode; None for `text-to-image`.
        by_lm: what the language model made; None without one.
        by_majority: what the most frequent codes of the examples make.
        figures: see `complete_image`.
    """

    given: np.ndarray | None
    wanted: np.ndarray | None
    by_lm: np.ndarray | None
    by_majority: np.ndarray
    figures: dict[str, Any]


def complete_image(
    opened: word_images.WordImages,
    pixels: np.ndarray,
    task: str,
    lm: FrozenLM | None,
    *,
    num_examples: int = len(denoising.SHARES),
    seed: int = 0,
    config: ProgressiveConfig = _PROGRESSIVE,
) -> Completed:
    """Inpaints, outpaints, deblurs, turns back or moves back an image by progressive decoding.

    The examples are noisy copies of the image itself, clean in up to three levels above the full grid, so
    most of the wanted codes can be read off them by a majority vote: what the language model adds is the
    difference to it. Text that is no valid word becomes the given image's word at that place.

    Args:
        opened: image tokenizer and words.
        pixels: the wanted image, uint8 [H, W, 3] of any size.
        task: a key of `denoising.CONDITIONS`.
        lm: a frozen language model; without one there is the majority vote alone.
        num_examples: noisy copies, 1 to 10; the noisiest are left out first.
        seed: of the noise.
        config: how the words are cut into segments.

    Returns:
        Images and `figures`: for each of `lm`, `majority` and `given` (the given image's own codes) the
        share of right codes among those wanted, `all` and by level `level1`, `level2`, ...; None where a
        level has none; and `valid`, the share of valid words that the language model wrote.

    Raises:
        UserError: the task is unknown, or `num_examples` is out of range.
    """
    if task not in denoising.CONDITIONS:
        raise UserError(f"The task {task!r} is unknown; use one of {', '.join(TASKS)}.")
    if not 1 <= num_examples <= len(denoising.SHARES):
        raise UserError(
            f"{num_examples} examples are out of range; give 1 to {len(denoising.SHARES)}."
        )
    tokenizer, table = opened.tokenizer, WordTable(opened.words)
    image = image_files.fit(pixels, tokenizer.image_size)
    given = denoising.CONDITIONS[task](image)
    condition, target = tokenizer.encode(np.stack([given, image]))
    grids = tokenizer.grids
    wanted = denoising.wanted_codes(task, tokenizer.image_size, grids)
    examples = denoising.noisy_pairs(
        CodePair(condition, target),
        len(table.words),
        shares=denoising.SHARES[-num_examples:],
        num_clean=_num_clean(grids),
        seed=seed,
    )
    majority = np.where(wanted, denoising.majority_codes(examples), target)
    found = {"majority": majority, "given": condition}
    valid = None
    if lm is not None:
        known = CodePair(condition, np.where(wanted, condition, target))
        found["lm"], valid = _write(lm, table, grids, known, examples, wanted, config)
    figures = {name: _shares_right(codes, target, wanted, grids) for name, codes in found.items()}
    decoded = tokenizer.decode(np.stack([target, majority, found.get("lm", majority)]))
    by_lm = None if lm is None else decoded[2]
    return Completed(given, decoded[0], by_lm, decoded[1], {**figures, "valid": valid})


def draw_caption(
    opened: word_images.WordImages,
    caption: str,
    documents: Iterable[Document],
    lm: FrozenLM | None,
    *,
    num_examples: int = 10,
    config: ProgressiveConfig = _PROGRESSIVE,
) -> Completed:
    """An image of a caption, after examples of captions and images.

    Text that is no valid word becomes the most frequent word of the examples at that place; the image of
    these words alone is the baseline. Arguments as of `complete_image`; the first `num_examples` documents
    with a text and a picture are the examples.

    Raises:
        UserError: there are too few documents, or the caption is empty.
    """
    if not caption.strip():
        raise UserError("The caption is empty; give a text.")
    shown = first_captioned(documents, num_examples)
    codes = opened.tokenizer.encode(_fitted(opened, shown))
    examples = [CodePair(d.text, row) for d, row in zip(shown, codes, strict=True)]
    majority = denoising.majority_codes(examples)
    table, grids = WordTable(opened.words), opened.tokenizer.grids
    by_lm, valid = None, None
    if lm is not None:
        wanted = np.ones(len(majority), bool)
        query = CodePair(caption, majority)
        written, valid = _write(lm, table, grids, query, examples, wanted, config)
        by_lm = opened.tokenizer.decode(written[None])[0]
    by_majority = opened.tokenizer.decode(majority[None])[0]
    return Completed(None, None, by_lm, by_majority, {"valid": valid})


def describe_image(
    opened: word_images.WordImages,
    pixels: np.ndarray,
    documents: Iterable[Document],
    lm: FrozenLM,
    *,
    question: str | None = None,
    num_examples: int = 8,
    levels: int = 2,
) -> str:
    """A caption of an image, or the answer to a question about it, by the words of its first levels.

    Args:
        opened: image tokenizer and words.
        pixels: uint8 [H, W, 3] of any size.
        documents: examples; the first `num_examples` with a text and a picture are shown. The text is the
            caption or, if a question is asked, a question up to its last `?` and the answer behind it.
        lm: a frozen language model.
        question: None for a caption.
        num_examples: at least 1.
        levels: number of first levels whose words stand for an image.

    Raises:
        UserError: there are too few documents, a text has no question, or there are fewer levels.
    """
    ends = code_grids.ends(opened.tokenizer.grids)
    if not 1 <= levels <= len(ends):
        raise UserError(f"levels is {levels}; this image tokenizer has 1 to {len(ends)}.")
    shown = first_captioned(documents, num_examples)
    image = image_files.fit(pixels, opened.tokenizer.image_size)
    codes = opened.tokenizer.encode(np.concatenate([_fitted(opened, shown), image[None]]))
    table = WordTable(opened.words)
    words = [table.text(row[: ends[levels - 1]]) for row in codes]
    if question is None:
        pairs = [(w, d.text) for w, d in zip(words, shown, strict=False)]
        made = prompts.captioning(pairs, words[-1])
    else:
        asked = [_answered(w, d) for w, d in zip(words, shown, strict=False)]
        made = prompts.answering(asked, words[-1], question)
    texts = lm.generate([made.prefix + made.queries[0]], num_tokens=ANSWER_TOKENS).texts
    if texts is None:
        raise UserError("This language model has no tokenizer, so it cannot answer in words.")
    return prompts.first_line(texts[0])


def first_captioned(documents: Iterable[Document], count: int) -> list[Document]:
    """The first `count` documents with a text and a picture.

    Raises:
        UserError: there are fewer, or `count` is below 1.
    """
    if count < 1:
        raise UserError(f"{count} examples are too few; give at least 1.")
    good = (d for d in documents if d.text.strip() and d.image is not None)
    found = list(itertools.islice(good, count))
    if len(found) < count:
        raise UserError(
            f"Only {len(found)} documents have a text and a picture; give {count}, or ask for fewer examples."
        )
    return found


def _answered(words: str, document: Document) -> prompts.Answered:
    question, mark, answer = document.text.rpartition("?")
    if not mark or not answer.strip():
        raise UserError(
            f"The text of document {document.id} is no question with an answer behind its question mark: "
            f"{document.text[:60]!r}."
        )
    return prompts.Answered(words, question + mark, answer)


def _num_clean(grids: code_grids.Grids) -> int:
    """The codes of the first levels that noise spares: at most three, and none with a full grid."""
    num_coarse = sum(grid != grids[-1] for grid in grids)
    return [0, *code_grids.ends(grids)][min(3, num_coarse)]


def _fitted(opened: word_images.WordImages, documents: Sequence[Document]) -> np.ndarray:
    size = opened.tokenizer.image_size
    pictures = [document.image for document in documents]
    return np.stack([image_files.fit(picture, size) for picture in pictures if picture is not None])


def _write(
    lm: FrozenLM,
    table: WordTable,
    grids: code_grids.Grids,
    query: CodePair,
    examples: Sequence[CodePair],
    wanted: np.ndarray,
    config: ProgressiveConfig,
) -> tuple[np.ndarray, float]:
    """Codes int32 [N], and the share of wanted codes that come from valid words."""
    total = sum(len(group) for _, group in progressive.segments(grids, wanted, config.segment))
    with progress.track("segments", total) as bar:
        written = progressive.write_codes(
            lm, table, grids, query, examples, wanted, config, on_segments=bar.update
        )
    return written.codes, float(written.is_valid[wanted].mean())


def _shares_right(
    codes: np.ndarray, target: np.ndarray, wanted: np.ndarray, grids: code_grids.Grids
) -> dict[str, float | None]:
    is_right, level = codes == target, code_grids.locate(grids).grid
    shares: dict[str, float | None] = {"all": float(is_right[wanted].mean())}
    for number in range(len(grids)):
        here = wanted & (level == number)
        shares[f"level{number + 1}"] = float(is_right[here].mean()) if here.any() else None
    return shares
