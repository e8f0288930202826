"""Search hits as plain values for JSON, contact sheets and the page of `rag-mm explore`."""

import base64
from typing import Any

import numpy as np

from rag_mm.core import image_files
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


def data_url(pixels: np.ndarray) -> str:
    """An image, uint8 [H, W, 3], as a PNG data URL."""
    return "data:image/png;base64," + base64.b64encode(image_files.encode_png(pixels)).decode(
        "ascii"
    )


def link(url: str | None) -> str | None:
    """The url if it is http(s), else None: an untrusted url could run a script instead."""
    return url if url is not None and url.lower().startswith(("http://", "https://")) else None
