"""Glyph names: as used in captions, and the base name shared by variants of one drawing."""

import re
import unicodedata

_VARIANT_WORDS = frozenset(
    "man woman person men women people boy girl child adult old older prince princess mr. mrs. mx "
    "santa man's woman's men's women's and left right up down leftwards rightwards left-facing "
    "right-facing tilted up-left up-right down-left down-right".split()
)
_MERFOLK = frozenset({"mermaid", "merman", "merperson"})


def clean_name(short_name: str, is_flag: bool) -> str:
    """Turns `:Côte_d’Ivoire:` into `flag of cote d'ivoire`: lower-case ASCII without `:_()&`."""
    name = short_name.strip(":").replace("_", " ").replace("’", "'").replace("&", "and")
    name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[()]", "", name)
    return f"flag of {name}" if is_flag else name


def base_name(name: str) -> str:
    """A cleaned name without words for person and direction.

    Glyphs with the same base name are variants of one drawing: `woman running facing right` and
    `person running` are both `running`, all clock faces are `clock`, all keycaps are `keycap`.
    """
    if name.endswith(("o'clock", "-thirty")):
        return "clock"
    if name.startswith("keycap"):
        return "keycap"
    if name in _MERFOLK:
        return "merfolk"
    words = name.removesuffix(" facing right").split()
    return " ".join(word for word in words if word not in _VARIANT_WORDS) or "person"
