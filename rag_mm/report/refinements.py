"""The HTML page of RECO's zero-shot suite: hits of both modalities, predictions before and after fusion."""

import dataclasses
from collections.abc import Sequence
from importlib import resources

import jinja2
import numpy as np

from rag_mm.core import image_files
from rag_mm.report import page


@dataclasses.dataclass(frozen=True)
class Guess:
    """The predicted class, its cosine, the true class's cosine, and whether the prediction is correct."""

    name: str
    score: float
    true_score: float
    is_right: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """A document of a memory: its image, uint8 [H, W, 3] or None, and its text."""

    image: np.ndarray | None
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Card:
    """One query.

    Attributes:
        picture: the query image, uint8 [H, W, 3].
        truth: its class.
        before, after: predictions without the memory and with it.
        image_neighbors: hits of the image, whose texts were fused into its embedding.
        text_query: name of the class predicted with the memory.
        text_neighbors: hits of that name, whose images were fused into its embedding.
    """

    picture: np.ndarray
    truth: str
    before: Guess
    after: Guess
    image_neighbors: Sequence[Pair]
    text_query: str
    text_neighbors: Sequence[Pair]


_SIDE = 96  # Pixels of an image on the page.


def render(title: str, cards: Sequence[Card]) -> str:
    """A self-contained HTML page without scripts; all document text is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["image"] = _image
    template = resources.files("rag_mm.report").joinpath("refinements.html.j2").read_text("utf-8")
    return environment.from_string(template).render(title=title, cards=cards)


def _image(pixels: np.ndarray, description: str) -> str:
    small = pixels if max(pixels.shape[:2]) <= 2 * _SIDE else image_files.fit(pixels, _SIDE)
    return page.image_tag(small, description)
