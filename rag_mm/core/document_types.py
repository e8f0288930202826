"""Documents, the input type of the whole library: ordered lists of text, image and video segments."""

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

    @property
    def pictures(self) -> tuple[np.ndarray, ...]:
        """The image, uint8 [H, W, 3], as the only picture."""
        return (self.pixels,)


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """A video segment; `frames` is uint8 [F, H, W, 3], RGB, F at least 1; `fps` is in frames per second.

    Raises:
        ValueError: `frames` has another dtype or shape, or `fps` is not a positive number.
    """

    frames: np.ndarray
    fps: float

    def __post_init__(self):
        shape = self.frames.shape
        if self.frames.dtype != np.uint8 or len(shape) != 4 or not shape[0] or shape[3] != 3:
            raise ValueError(f"a video is uint8 [F, H, W, 3], not {self.frames.dtype} {shape}")
        if not 0 < self.fps < float("inf"):
            raise ValueError(f"fps is {self.fps}; give a positive number of frames per second")

    @property
    def pictures(self) -> tuple[np.ndarray, ...]:
        """The frames, each uint8 [H, W, 3]."""
        return tuple(self.frames)


Segment = Text | Image | Video


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
        """The first picture, uint8 [H, W, 3], an image or the first frame of a video; None if none."""
        return next((s.pictures[0] for s in self.segments if not isinstance(s, Text)), None)

    @property
    def pictures(self) -> list[np.ndarray]:
        """All images and frames of videos in order, each uint8 [H, W, 3]."""
        return [picture for s in self.segments if not isinstance(s, Text) for picture in s.pictures]
