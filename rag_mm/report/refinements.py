"""What a memory changed, as a page: what was retrieved on either side, and scores before and after."""

import dataclasses
from collections.abc import Sequence
from importlib import resources

import jinja2
import numpy as np

from rag_mm.core import image_files
from rag_mm.report import page


@dataclasses.dataclass(frozen=True)
class Guess:
    """The likeliest class, its cosine, that of the right class, and whether they are one."""

    name: str
    score: float
    own_score: float
    is_right: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A row of a memory: its picture, uint8 [H, W, 3] or None, and its text."""

    image: np.ndarray | None
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Card:
    """One query.

    Attributes:
        picture: uint8 [H, W, 3].
        truth: its class.
        before, after: without the memory and with it.
        image_side: what the picture found, whose texts were fused into it.
        asked_text: the class that was guessed in the end.
        text_side: what that class's name found, whose pictures were fused into it.
    """

    picture: np.ndarray
    truth: str
    before: Guess
    after: Guess
    image_side: Sequence[Pair]
    asked_text: str
    text_side: Sequence[Pair]


_SIDE = 96  # pixels of a picture on the page


def render(title: str, cards: Sequence[Card]) -> str:
    """A page of HTML that needs nothing else and runs no script; what documents say is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["picture"] = _picture
    template = resources.files("rag_mm.report").joinpath("refinements.html.j2").read_text("utf-8")
    return environment.from_string(template).render(title=title, cards=cards)


def _picture(pixels: np.ndarray, description: str) -> str:
    small = pixels if max(pixels.shape[:2]) <= 2 * _SIDE else image_files.fit(pixels, _SIDE)
    return page.picture_tag(small, description)
