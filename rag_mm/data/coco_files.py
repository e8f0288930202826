"""COCO's captions and instances (Lin et al. 2014, cocodataset.org, "Data format"), as published.

`annotations/captions_SPLIT.json` and `annotations/instances_SPLIT.json` are objects with `images`, each with
`id` and `file_name`, and `annotations` with `image_id` and `caption`, or `category_id`, `bbox` [x, y, width,
height] in pixels and `iscrowd`; instances also have `categories`. Pictures are in the folder `SPLIT` beside
`annotations`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from etils import epath

from rag_mm.core import image_files
from rag_mm.data import captions, instruction_records
from rag_mm.data.instruction_items import ANSWER, InstructionItem
from rag_mm.data.instruction_records import Found
from rag_mm.memory.writing import stream

T = TypeVar("T")
Box = tuple[str, float, float, float, float]  # name, left, top, width, height


def read_captions(path: epath.Path, image_size: int) -> Iterator[Found]:
    """Items of the task `caption`, one for each picture that has captions; the first of them is the answer.

    Raises:
        UserError: there is no such file, or it is not of this form.
    """
    file = instruction_records.find_file(path, "captions_*.json", "annotations/captions_*.json")
    found = instruction_records.read_lists(file, "images", "annotations")
    by_image, rejects = _group(found, _caption)
    yield from rejects
    for image_id, entry in _images(found)[0]:
        if image_id in by_image:
            texts = by_image[image_id]
            make = functools.partial(_captioned, texts=texts, image_size=image_size)
            yield _item(file, image_id, entry, make)


def read_boxes(path: epath.Path, image_size: int) -> Iterator[Found]:
    """Items of the task `boxes`, one for each picture with objects, which are told in the order of the file.

    Boxes are told in pixels of the picture as it is cropped to `image_size`; what lies outside is left out,
    and so are crowds. The caption is the first of `captions_SPLIT.json` where that is beside the file, else
    empty.

    Raises:
        UserError: there is no such file, or it is not of this form.
    """
    file = instruction_records.find_file(path, "instances_*.json", "annotations/instances_*.json")
    found = instruction_records.read_lists(file, "images", "annotations", "categories")
    names = {}
    for entry in found["categories"]:
        if isinstance(entry, dict) and type(entry.get("id")) is int:
            names[entry["id"]] = entry.get("name")
    by_image, rejects = _group(found, lambda fields: _box(fields, names))
    yield from rejects
    beside = file.parent / file.name.replace("instances_", "captions_", 1)
    texts: dict[int, list[str]] = {}
    if beside != file and beside.exists():
        texts, _ = _group(instruction_records.read_lists(beside, "images", "annotations"), _caption)
    for image_id, entry in _images(found)[0]:
        boxes = [box for box in by_image.get(image_id, []) if box is not None]
        if boxes:
            caption = texts.get(image_id, [""])[0]
            make = functools.partial(_boxed, boxes=boxes, caption=caption, image_size=image_size)
            yield _item(file, image_id, entry, make)


def _group(
    found: dict[str, Any], parse: Callable[[dict[str, Any]], T]
) -> tuple[dict[int, list[T]], list[stream.Reject]]:
    """What the annotations of each image say, in lists that are not empty, and the bad records."""
    images, rejects = _images(found)
    known = {image_id for image_id, _ in images}
    by_image: dict[int, list[T]] = {}
    for number, annotation in enumerate(found["annotations"], start=1):
        try:
            fields = instruction_records.fields_of(annotation)
            image_id = instruction_records.id_of(fields, "image_id")
            if image_id not in known:
                raise captions.BadRecord(
                    "bad-field", f"is about the image {image_id}, which is not listed."
                )
            parsed = parse(fields)
            by_image.setdefault(image_id, []).append(parsed)
        except captions.BadRecord as error:
            name = instruction_records.name_of(annotation, "annotation", "id", number)
            rejects.append(error.as_reject(name))
    return by_image, rejects


def _images(
    found: dict[str, Any],
) -> tuple[list[tuple[int, dict[str, Any]]], list[stream.Reject]]:
    """The entries of images with their ids, and those without one."""
    images, rejects = [], []
    for number, entry in enumerate(found["images"], start=1):
        try:
            fields = instruction_records.fields_of(entry)
            images.append((instruction_records.id_of(fields, "id"), fields))
        except captions.BadRecord as error:
            rejects.append(error.as_reject(f"image number {number}"))
    return images, rejects


def _item(
    file: epath.Path,
    image_id: int,
    fields: dict[str, Any],
    make: Callable[[str, Any], InstructionItem],
) -> Found:
    """The item of an image's entry, by its id and its pixels."""

    def read() -> InstructionItem:
        name = instruction_records.text_of(fields, "file_name")
        split = file.stem.partition("_")[2]
        folder = instruction_records.find_folder(file, split, "images")
        return make(str(image_id), instruction_records.read_whole_picture(folder, name))

    return instruction_records.attempt(f"image {image_id}", read)


def _caption(fields: dict[str, Any]) -> str:
    return instruction_records.text_of(fields, "caption")


def _captioned(name: str, pixels: Any, texts: Sequence[str], image_size: int) -> InstructionItem:
    picture = image_files.fit(pixels, image_size)
    return InstructionItem(name, "caption", {ANSWER: texts[0]}, picture, answers=tuple(texts))


def _box(fields: dict[str, Any], names: dict[int, Any]) -> Box | None:
    """Name, left, top, width and height of an object in pixels; None for a crowd."""
    category, box = fields.get("category_id"), fields.get("bbox")
    name = names.get(category) if type(category) is int else None
    if not isinstance(name, str) or not name.strip():
        raise captions.BadRecord("bad-field", f"has the category {category!r}, which has no name.")
    if not isinstance(box, list) or [type(v) in (int, float) for v in box] != [True] * 4:
        raise captions.BadRecord("bad-field", "has a bbox that is not [x, y, width, height].")
    left, top, width, height = box
    if min(left, top) < 0 or min(width, height) <= 0:
        raise captions.BadRecord("bad-field", f"has the bbox {box}, which is no box in a picture.")
    return None if fields.get("iscrowd") else (name, left, top, width, height)


def _boxed(
    name: str, pixels: Any, boxes: Sequence[Box], caption: str, image_size: int
) -> InstructionItem:
    height, width = pixels.shape[:2]
    for label, left, top, wide, high in boxes:
        # Published corners may lie a rounding beyond the edge.
        if left + wide > width + 1 or top + high > height + 1:
            raise captions.BadRecord(
                "bad-field", f"has a {label} that reaches beyond its {width} x {height} pixels."
            )
    told = [text for box in boxes if (text := _tell(box, height, width, image_size))]
    if not told:
        raise captions.BadRecord("bad-field", "has no object in the square at its middle.")
    fields = {"caption": caption, "boxes": " and ".join(told)}
    return InstructionItem(name, "boxes", fields, image_files.fit(pixels, image_size))


def _tell(box: Box, height: int, width: int, image_size: int) -> str:
    """A box in words, in pixels of the cropped picture; empty if nothing of it is left."""
    name, left, top, wide, high = box
    side = min(height, width)
    scale, x, y = image_size / side, (width - side) / 2, (height - side) / 2
    corners = (left - x, top - y, left + wide - x, top + high - y)
    x1, y1, x2, y2 = (round(min(max(value, 0), side) * scale) for value in corners)
    return f"{name} at {x1} {y1} to {x2} {y2}" if x2 > x1 and y2 > y1 else ""
