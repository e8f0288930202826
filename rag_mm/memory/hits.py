"""Search hits and records as plain values for JSON, contact sheets and the page of `rag-mm explore`."""

import base64
from typing import Any

import numpy as np

from rag_mm.core import image_files
from rag_mm.core.document_types import Image, Segment, Text
from rag_mm.memory.index.protocol import Neighbors
from rag_mm.memory.retrieval_memory import Memory


def describe(memory: Memory, neighbors: Neighbors) -> list[dict[str, Any]]:
    """The hits of the first query as dicts, best first.

    Keys: `id`, `score`, `text`, `image` (a data URL or None), `url`, `license`, `row` and `link` (the url if
    it is an http(s) address, else None). Texts and urls are untrusted: escape them before display.

    Raises:
        UserError: a record is damaged.
    """
    result = []
    for row, score in zip(neighbors.ids[0].tolist(), neighbors.scores[0].tolist(), strict=True):
        if row < 0:
            continue
        document = memory.document(row)
        result.append(
            {
                "id": document.id,
                "score": score,
                "text": document.text,
                "image": None if document.image is None else data_url(document.image),
                "url": document.url,
                "license": document.license,
                "row": row,
                "link": link(document.url),
            }
        )
    return result


def describe_record(memory: Memory, row: int) -> dict[str, Any]:
    """A row's document, segment by segment, as a JSON-ready dict.

    Keys: `row`, `id`, `url`, `license` and `segments`. A segment is `{"text"}`, `{"image": [H, W]}` or
    `{"video": [F, H, W], "fps"}`; images and videos also have `codes`, the shape of their codes by image
    tokenizer.

    Raises:
        UserError: there is no such row, or its record is damaged.
    """
    stored = memory.record(row)
    document = stored.document
    segments = []
    for i, segment in enumerate(document.segments):
        described = _describe_segment(segment)
        if not isinstance(segment, Text):
            shapes = {name: list(by[i].shape) for name, by in stored.codes.items() if i in by}
            described["codes"] = shapes
        segments.append(described)
    return {
        "row": row,
        "id": document.id,
        "url": document.url,
        "license": document.license,
        "segments": segments,
    }


def _describe_segment(segment: Segment) -> dict[str, Any]:
    if isinstance(segment, Text):
        return {"text": segment.text}
    if isinstance(segment, Image):
        return {"image": list(segment.pixels.shape[:2])}
    return {"video": list(segment.frames.shape[:3]), "fps": segment.fps}


def data_url(pixels: np.ndarray) -> str:
    """An image, uint8 [H, W, 3], as a PNG data URL."""
    return "data:image/png;base64," + base64.b64encode(image_files.encode_png(pixels)).decode(
        "ascii"
    )


def link(url: str | None) -> str | None:
    """The url if it is http(s), else None: an untrusted url could run a script instead."""
    return url if url is not None and url.lower().startswith(("http://", "https://")) else None
