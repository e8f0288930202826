"""Progressive in-context decoding: a frozen language model writes an image's words segment by segment (SPAE).

The words of the first levels are written one segment after the other, each behind the words before it. A
segment of a later level sees the condition and the level before it only, so that all of a level are written
at once and errors do not add up within a level.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from rag_mm.core import checks, code_grids
from rag_mm.core.code_grids import Grids
from rag_mm.core.errors import UserError
from rag_mm.frozen_lm import prompts
from rag_mm.frozen_lm.denoising import CodePair
from rag_mm.frozen_lm.lm_protocol import FrozenLM
from rag_mm.frozen_lm.word_text import WordTable


@dataclasses.dataclass(frozen=True)
class ProgressiveConfig:
    """How the words are cut into segments.

    Attributes:
        segment: words per call, at least 1.
        before: words before a segment that its prompt shows in the autoregressive levels, at least 0.
        autoregressive_levels: number of first levels whose segments are written one after the other.
        tokens_per_word: of the language model, for which a call leaves space, at least 1.
    """

    segment: int = 4
    before: int = 16
    autoregressive_levels: int = 3
    tokens_per_word: int = 3

    def __post_init__(self):
        checks.at_least(self, 1, "segment", "tokens_per_word")
        checks.at_least(self, 0, "before", "autoregressive_levels")


@dataclasses.dataclass(frozen=True, eq=False)
class WrittenCodes:
    """What a language model wrote.

    Attributes:
        codes: int32 [N].
        is_valid: bool [N], whether a code comes from a valid word that the model wrote or was given, not from
            the fallback.
    """

    codes: np.ndarray
    is_valid: np.ndarray


def segments(grids: Grids, wanted: np.ndarray, size: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(level from 0, its segments) in order; a segment is the indices int [<= size] of wanted codes.

    Args:
        grids: of the image's codes.
        wanted: bool [N].
        size: codes per segment.
    """
    level_of = code_grids.locate(grids).grid
    for level in range(len(grids)):
        places = np.flatnonzero(wanted & (level_of == level))
        yield level, [places[i : i + size] for i in range(0, len(places), size)]


def parents(grids: Grids) -> np.ndarray:
    """For each code, the one of the level before that covers its place: int [N]; its own index in level 1."""
    at, ends = code_grids.locate(grids), [0, *code_grids.ends(grids)]
    found = np.arange(ends[-1])
    for level in range(1, len(grids)):
        mine = at.grid == level
        (rows, columns), (above_rows, above_columns) = grids[level], grids[level - 1]
        row = at.row[mine] * above_rows // rows
        column = at.column[mine] * above_columns // columns
        found[mine] = ends[level - 1] + row * above_columns + column
    return found


def write_codes(
    lm: FrozenLM,
    table: WordTable,
    grids: Grids,
    query: CodePair,
    examples: Sequence[CodePair],
    wanted: np.ndarray,
    config: ProgressiveConfig = ProgressiveConfig(),
    on_segments: Callable[[int], None] = lambda done: None,
) -> WrittenCodes:
    """Lets a frozen language model write the wanted codes of an image.

    Args:
        lm: the language model.
        table: the word of each code.
        grids: of the codes.
        query: the condition, and codes int [N]: where a code is not wanted the right one, elsewhere the
            fallback for text that is no valid word.
        examples: pairs in context; captions as conditions if the query's is one.
        wanted: bool [N].
        config: see there.
        on_segments: called with the number of segments written so far.

    Raises:
        UserError: there are no examples, or the language model gives no text.
    """
    if not examples:
        raise UserError("Progressive decoding needs at least one example in context.")
    codes, is_valid, done = np.array(query.target, np.int32), ~wanted, 0
    above = parents(grids)
    for level, places in segments(grids, wanted, config.segment):
        is_serial = level < config.autoregressive_levels
        for group in [[place] for place in places] if is_serial else [places]:
            if not group:
                continue
            so_far = CodePair(query.condition, codes)
            befores = [_before(where, level, above, config) for where in group]
            asked = [
                _prompt(table, so_far, examples, where, before, is_serial)
                for where, before in zip(group, befores, strict=True)
            ]
            texts = lm.generate(asked, num_tokens=config.segment * config.tokens_per_word).texts
            if texts is None:
                raise UserError("This language model has no tokenizer, so it cannot write words.")
            for where, text in zip(group, texts, strict=True):
                codes[where], is_valid[where] = table.parse(text, codes[where])
            done += len(group)
            on_segments(done)
    return WrittenCodes(codes, is_valid)


def _before(
    where: np.ndarray, level: int, above: np.ndarray, config: ProgressiveConfig
) -> np.ndarray:
    """Indices of the words that a segment's prompt shows before it."""
    if level < config.autoregressive_levels:
        return np.arange(max(0, where[0] - config.before), where[0])
    return above[where] if level else where[:0]


def _prompt(
    table: WordTable,
    query: CodePair,
    examples: Sequence[CodePair],
    where: np.ndarray,
    before: np.ndarray,
    is_serial: bool,
) -> str:
    def known(pair: CodePair) -> prompts.Continued:
        given = pair.condition
        condition = given if isinstance(given, str) else table.text(given[where])
        return prompts.Continued(condition, table.text(pair.target[before]))

    shown = [known(pair)._replace(segment=table.text(pair.target[where])) for pair in examples]
    made = prompts.next_words(shown, known(query), len(where) if is_serial else None)
    return made.prefix + made.queries[0]
