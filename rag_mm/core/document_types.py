"""Documents, the input type of the whole library: ordered lists of text and image segments."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Text:
    """A text segment."""

    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """An image segment; `pixels` is uint8 [H, W, 3], RGB.

    Raises:
        ValueError: `pixels` has another dtype or shape.
    """

    pixels: np.ndarray

    def __post_init__(self):
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or self.pixels.shape[2] != 3:
            raise ValueError(
                f"an image is uint8 [H, W, 3], not {self.pixels.dtype} {self.pixels.shape}"
            )


Segment = Text | Image


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """A document: its segments, an id that is unique within a memory, and optionally its URL and license."""

    id: str
    segments: tuple[Segment, ...]
    url: str | None = None
    license: str | None = None

    @property
    def text(self) -> str:
        """All text segments joined by spaces; empty if there are none."""
        return " ".join(s.text for s in self.segments if isinstance(s, Text))

    @property
    def image(self) -> np.ndarray | None:
        """The first image's pixels, uint8 [H, W, 3], or None."""
        return next((s.pixels for s in self.segments if isinstance(s, Image)), None)
