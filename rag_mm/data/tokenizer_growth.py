"""Refuses a stranger's tokenizer.json whose rules would make texts explode or take forever.

Rules are applied one after the other, so lengths multiply: nine replacements of one character by nine turn 40
characters into 10 GB. A repeated group that itself repeats, as in `(a+)+`, can be matched in exponentially
many ways, each of which a failing search tries.
"""

import base64
import binascii
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rag_mm.core.errors import UserError

MAX_GROWTH = 256
"""Largest product of the factors by which rules may lengthen a text; NFKC alone has 33."""
MAX_REGEX = 4096
"""Longest regular expression, in characters."""
MAX_WORD = 1024
"""Longest word that WordPiece may search through, longest prefix and suffix of a piece, in characters."""
_STAGES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_WORDS = (
    "prefix",
    "suffix",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "prepend",
    "unk_token",
)


def check(values: Mapping[str, Any], where: str) -> None:
    """Checks the content of a tokenizer.json.

    Raises:
        UserError: a rule is out of bounds; `where` is named.
    """
    model = values.get("model")
    rules = [rule for stage in _STAGES for rule in _rules(values.get(stage))]
    rules += [model] if isinstance(model, Mapping) else []
    growth = 1
    for rule in rules:
        growth *= max(1, _growth(rule))
        for key in _WORDS:
            if isinstance(rule.get(key), str) and len(rule[key]) > MAX_WORD:
                raise UserError(f"{where}: {key} has more than {MAX_WORD:,} characters.")
        longest = rule.get("max_input_chars_per_word", 0)
        if not isinstance(longest, int) or longest > MAX_WORD:
            raise UserError(f"{where}: max_input_chars_per_word is over {MAX_WORD:,}.")
        pattern = rule.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
        if isinstance(regex, str) and (len(regex) > MAX_REGEX or _repeats_repeats(regex)):
            raise UserError(
                f"{where}: the pattern {regex[:40]!r} may take forever; it is not used."
            )
    if growth > MAX_GROWTH:
        raise UserError(
            f"{where}: its rules may lengthen a text more than {MAX_GROWTH} times; it is not used."
        )


def _rules(node: Any) -> Iterator[Mapping[str, Any]]:
    """All rules in a stage, which may hold further ones."""
    if isinstance(node, Mapping):
        if "type" in node:
            yield node
        for value in node.values():
            yield from _rules(value)
    elif isinstance(node, list):
        for value in node:
            if isinstance(value, Mapping):
                yield from _rules(value)


def _growth(rule: Mapping[str, Any]) -> int:
    """The factor by which a rule may lengthen a text."""
    kind, content, pattern = rule.get("type"), rule.get("content"), rule.get("pattern")
    if kind == "Replace" and isinstance(content, str):
        literal = pattern.get("String") if isinstance(pattern, Mapping) else None
        if isinstance(literal, str) and literal:
            return math.ceil(len(content) / len(literal))
        return len(content) + 1  # A regular expression may match between characters, too.
    if kind == "Precompiled":
        try:
            data = base64.b64decode(rule.get("precompiled_charsmap") or "", validate=True)
        except (TypeError, ValueError, binascii.Error):
            return 1  # The library refuses it.
        # A trie, preceded by its length in bytes, then the replacements, each ended by a zero.
        texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
        return max(map(len, texts))
    return 1


def _repeats_repeats(regex: str) -> bool:
    """Whether an unbounded repetition is applied to a group that holds one."""
    regex = re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "x", regex, flags=re.DOTALL)  # escapes and classes
    holds = [False]  # By open group: whether it holds an unbounded repetition.
    after_group = False  # Whether the group that was just closed does.
    for match in re.finditer(r"\(|\)|[*+]|\{\d*,?\d*\}", regex):
        token = match[0]
        is_adjacent = match.start() > 0 and regex[match.start() - 1] == ")"
        if token == "(":
            holds.append(False)
        elif token == ")":
            after_group = holds.pop() if len(holds) > 1 else False
            holds[-1] |= after_group
        elif token in "*+" or "," in token or int(token.strip("{}") or 0) > 1:
            if is_adjacent and after_group:
                return True
            holds[-1] = holds[-1] or token in "*+" or token.endswith(",}")
    return False
