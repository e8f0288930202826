"""Words that others wrote, in Markdown and in YAML: shown as they are, and neither markup nor structure."""

import re
from collections.abc import Iterable, Sequence

from rag_mm.core import terminal

MAX_CHARACTERS = 300


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; its cells are made `plain`."""
    lines = [head, ["---"] * len(head), *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line; cut where it is long."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!])", r"\\\1", _short(text))


def yaml_string(text: str) -> str:
    """A YAML string of any text, on one line; cut where it is long."""
    characters = (
        c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in _short(text)
    )
    return f'"{"".join(characters)}"'


def _short(text: str) -> str:
    line = " ".join(terminal.printable(text).split())
    return line if len(line) <= MAX_CHARACTERS else f"{line[:MAX_CHARACTERS]}…"
