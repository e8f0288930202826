"""Documents: the one input type everywhere, an ordered list of text and image segments."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Text:
    """A run of text."""

    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Image:
    """A picture: `pixels` is uint8 [H, W, 3], RGB."""

    pixels: np.ndarray

    def __post_init__(self):
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or self.pixels.shape[2] != 3:
            raise ValueError(
                f"an image is uint8 [H, W, 3], not {self.pixels.dtype} {self.pixels.shape}"
            )


Segment = Text | Image


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """Segments with an id that is unique in its memory, and where they came from."""

    id: str
    segments: tuple[Segment, ...]
    url: str | None = None
    license: str | None = None

    @property
    def text(self) -> str:
        """All text segments joined by a space; empty if there is none."""
        return " ".join(s.text for s in self.segments if isinstance(s, Text))

    @property
    def image(self) -> np.ndarray | None:
        """The first image's pixels, uint8 [H, W, 3], or None."""
        return next((s.pixels for s in self.segments if isinstance(s, Image)), None)
