"""Images as words and back, for commands, reports and notebooks."""

import numpy as np

from rag_mm.core import code_grids, image_files
from rag_mm.core.errors import UserError
from rag_mm.frozen_lm.word_text import WordTable
from rag_mm.models.spae import objective
from rag_mm.report.word_figure import WordedImage, WordLevel
from rag_mm.stages.spae import word_images


def describe(opened: word_images.WordImages, pixels: np.ndarray) -> WordedImage:
    """An image uint8 [H, W, 3] of any size as words; `report.word_figure.words_png` draws them."""
    tokenizer, table = opened.tokenizer, WordTable(opened.words)
    image = image_files.fit(pixels, tokenizer.image_size)
    codes = tokenizer.encode(image[None])
    scores = opened.relative_scores(image[None])
    levels, start = [], 0
    for number, (rows, columns) in enumerate(tokenizer.grids, 1):
        end = start + rows * columns
        here = codes[0, start:end].reshape(rows, columns)
        decoded = tokenizer.decode(codes, number)[0]
        error = np.square((decoded.astype(np.float64) - image) / 255).mean()
        levels.append(
            WordLevel(
                tuple(tuple(table.words[code] for code in row) for row in here),
                None if scores is None else scores[0][here],
                end,
                decoded,
                objective.psnr(max(float(error), 1e-10)),
            )
        )
        start = end
    return WordedImage(image, tuple(levels))


def decode_text(opened: word_images.WordImages, text: str) -> np.ndarray:
    """The image uint8 [H, W, 3] of words separated by white space, those of the first few levels.

    Raises:
        UserError: a word is unknown, or the number of words is not that of the first few levels.
    """
    codes = WordTable(opened.words).strict_codes(text)
    ends = code_grids.ends(opened.tokenizer.grids)
    if len(codes) not in ends:
        counts = ", ".join(map(str, ends))
        raise UserError(f"These are {len(codes)} words; an image has one of {counts}.")
    return opened.tokenizer.decode(codes[None], ends.index(len(codes)) + 1)[0]
