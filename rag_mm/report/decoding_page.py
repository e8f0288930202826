"""The HTML page about decoding: claims, the sweep of guidance, examples, candidates with scores, tables."""

import base64
import dataclasses
from collections.abc import Sequence
from importlib import resources

import jinja2
import numpy as np

from rag_mm.report import page


@dataclasses.dataclass(frozen=True)
class TextTable:
    """Head and rows of texts, and a note above."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """An image, uint8 [H, W, 3], the lines below it, and whether it is marked as the one that was kept."""

    image: np.ndarray
    lines: Sequence[str]
    is_kept: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Strip:
    """Images next to each other under a caption."""

    caption: str
    frames: Sequence[Frame]


@dataclasses.dataclass(frozen=True, eq=False)
class PageSection:
    """A heading, what the section shows, and its parts in this order.

    Attributes:
        title: heading.
        text: paragraph below it.
        picture: PNG and its description, or None.
        strips: rows of images.
        tables: tables.
    """

    title: str
    text: str
    picture: tuple[bytes, str] | None = None
    strips: Sequence[Strip] = ()
    tables: Sequence[TextTable] = ()


def render(title: str, lead: str, sections: Sequence[PageSection]) -> str:
    """A self-contained HTML page without scripts; all texts are escaped.

    Args:
        title: heading.
        lead: first paragraph.
        sections: in order.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"image": page.image_tag, "data_url": _data_url}
    template = resources.files("rag_mm.report").joinpath("decoding.html.j2").read_text("utf-8")
    return environment.from_string(template).render(title=title, lead=lead, sections=sections)


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
