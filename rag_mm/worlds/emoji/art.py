"""The emoji art: a WebP sheet and its index, and the art of each class at any size.

The sheet holds 64-pixel cells with alpha, rendered by `render.py`; the classes in the index were
merged by `classes.py`.
"""

import functools
import importlib.resources
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

SHEET_FILE = "sheet.webp"
INDEX_FILE = "index.json"
WHITE = (255, 255, 255)


def draw_cells(cells: np.ndarray, size: int) -> np.ndarray:
    """Resizes RGBA cells with straight alpha: uint8 [N, H, W, 4] to uint8 [N, size, size, 4].

    Pillow filters premultiplied integer values: transparent pixels leak no color, and the result is
    bitwise identical on every machine.
    """
    drawn = [Image.fromarray(cell).resize((size, size), Image.Resampling.LANCZOS) for cell in cells]
    return np.stack([np.asarray(image) for image in drawn])


def lay_on(rgba: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """Composites uint8 [..., 4] with straight alpha onto a plain color: uint8 [..., 3]."""
    alpha = rgba[..., 3:].astype(np.int32)
    background = np.array(color, np.int32) * (255 - alpha)
    return ((rgba[..., :3] * alpha + background + 127) // 255).astype(np.uint8)


def read_cells(sheet: bytes, cell: int, glyphs: Sequence[int]) -> np.ndarray:
    """Cuts cells, numbered row by row, from an encoded sheet: uint8 [N, cell, cell, 4]."""
    pixels = np.asarray(Image.open(io.BytesIO(sheet)))
    rows, columns = pixels.shape[0] // cell, pixels.shape[1] // cell
    grid = pixels.reshape(rows, cell, columns, cell, 4).swapaxes(1, 2)
    return grid[np.array(glyphs) // columns, np.array(glyphs) % columns]


class Art:
    """The art and names of all classes.

    Attributes:
        names: the names of each class, that of the drawn glyph first.
        is_flag: bool [num_classes], flags of countries and regions.
        num_classes: number of classes; ids are 0..num_classes-1.
    """

    def __init__(self, index: dict[str, Any], sheet: bytes):
        """Takes the output of `render.py`: the parsed index and the bytes of the sheet."""
        glyphs = [entry["glyph"] for entry in index["classes"]]
        self.names = tuple(tuple(entry["names"]) for entry in index["classes"])
        self.is_flag = np.array([index["glyphs"][glyph]["flag"] for glyph in glyphs])
        self.num_classes = len(glyphs)
        self._cells = read_cells(sheet, index["cell"], glyphs)
        self._drawn: dict[int, np.ndarray] = {}
        self._cards: dict[int, np.ndarray] = {}

    def drawn(self, size: int) -> np.ndarray:
        """All classes at `size` pixels with straight alpha: uint8 [num_classes, size, size, 4]."""
        if size not in self._drawn:
            drawn = draw_cells(self._cells, size)
            drawn.setflags(write=False)
            self._drawn[size] = drawn
        return self._drawn[size]

    def cards(self, size: int) -> np.ndarray:
        """All classes on white: uint8 [num_classes, size, size, 3]."""
        if size not in self._cards:
            cards = lay_on(self.drawn(size), WHITE)
            cards.setflags(write=False)
            self._cards[size] = cards
        return self._cards[size]

    def rgba(self, class_id: int, size: int) -> np.ndarray:
        """One class with straight alpha: uint8 [size, size, 4], read-only."""
        return self.drawn(size)[class_id]

    def card(self, class_id: int, size: int) -> np.ndarray:
        """One class on white: uint8 [size, size, 3], read-only."""
        return self.cards(size)[class_id]


@functools.cache
def load_art() -> Art:
    """Loads the sheet and the index that ship with the package."""
    folder = importlib.resources.files("rag_mm.worlds.emoji")
    index = json.loads(folder.joinpath(INDEX_FILE).read_text())
    return Art(index, folder.joinpath(SHEET_FILE).read_bytes())
