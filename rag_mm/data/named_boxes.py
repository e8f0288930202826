"""Boxes with names, as a user gives them, and in words, as models read them.

CM3Leon's spatially grounded generation tells boxes in the text (Table 5); here `apple at 8 0 to 32 24` gives
left, top, right and bottom in pixels of the image.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from etils import epath

from rag_mm.core import caption_text, files
from rag_mm.core.errors import UserError


class NamedBox(NamedTuple):
    """What is to be where.

    Attributes:
        name: in words.
        box: left, top, right and bottom in pixels, right and bottom excluded.
    """

    name: str
    box: Sequence[int]


def read(path: epath.PathLike) -> list[NamedBox]:
    """The boxes of a JSON file; raises UserError as `parse` does, or where the file cannot be read."""
    try:
        text = epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    return parse(text, str(path))


def parse(text: str | bytes, source: str) -> list[NamedBox]:
    """The boxes of a JSON text `[{"name": "apple", "box": [8, 0, 32, 24]}, ..]`.

    Args:
        text: of JSON.
        source: what the error calls it.

    Raises:
        UserError: it is not of this form. Whether boxes lie in an image is not checked: see `check`.
    """
    try:
        found = files.parse_json(text if isinstance(text, bytes) else text.encode())
    except ValueError:
        found = None
    if not isinstance(found, list) or not found or not all(map(_is_entry, found)):
        raise UserError(
            f'{source} is not a JSON list [{{"name": "apple", "box": [left, top, right, bottom]}}, ..] '
            "of one or more boxes; give one."
        )
    return [NamedBox(entry["name"], entry["box"]) for entry in found]


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and {"name", "box"} <= set(entry)


def check(boxes: Iterable[NamedBox], image_size: int) -> list[NamedBox]:
    """The boxes with clean names.

    Raises:
        UserError: a name is empty or no text, or a box is not of four whole numbers, empty or outside of an
            image of `image_size` pixels in height and width.
    """
    checked = []
    for number, (name, box) in enumerate(boxes, start=1):
        cleaned = caption_text.clean(name) if isinstance(name, str) else ""
        if not cleaned:
            raise UserError(f"Box {number} has the name {name!r}; give a text.")
        if not _is_inside(box, image_size):
            raise UserError(
                f"Box {number}, {cleaned!r}, is {_shown(box)}, which is no box in an image of {image_size} x "
                f"{image_size} pixels; give [left, top, right, bottom] from 0 to {image_size}."
            )
        checked.append(NamedBox(cleaned, tuple(box)))
    return checked


def _is_inside(box: Any, image_size: int) -> bool:
    if not isinstance(box, Sequence) or [type(value) for value in box] != [int] * 4:
        return False
    left, top, right, bottom = box
    return 0 <= left < right <= image_size and 0 <= top < bottom <= image_size


def _shown(box: Any) -> str:
    shown = repr(list(box) if isinstance(box, tuple) else box)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"


def tell(boxes: Iterable[NamedBox]) -> str:
    """The boxes in words, joined by `and`."""
    return " and ".join(f"{name} at {box[0]} {box[1]} to {box[2]} {box[3]}" for name, box in boxes)


def tell_names(boxes: Iterable[NamedBox]) -> str:
    """The names alone, joined by `and`: a query that finds documents of them."""
    return " and ".join(name for name, _ in boxes)
