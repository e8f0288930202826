"""What every document is checked for before it is written, and the form in which it is kept."""

import dataclasses

import numpy as np

from rag_mm.core import caption_text, document_types, image_files
from rag_mm.memory.writing import stream


def find_problem(document: document_types.Document, is_known: bool) -> stream.Reject | None:
    """Why a document cannot be written, or None; `is_known`: an earlier one has its id."""
    name = document.id
    if not name:
        problem = "A document has an empty id: give every document one."
        return stream.Reject(name, "empty-id", problem)
    if is_known:
        return duplicate(name)
    if document.image is None and not document.text.strip():
        problem = f"Document {name!r} has neither text nor image."
        return stream.Reject(name, "nothing-to-embed", problem)
    return None


def duplicate(name: str) -> stream.Reject:
    """The problem of a document with the id of an earlier one."""
    problem = f"Two documents have the id {name!r}: rename one, or leave it out."
    return stream.Reject(name, "duplicate-id", problem)


def fit(document: document_types.Document, image_size: int) -> document_types.Document:
    """The document with its texts cleaned and its pictures scaled to `image_size` pixels a side."""
    segments = tuple(_fit_segment(segment, image_size) for segment in document.segments)
    return dataclasses.replace(document, segments=segments)


def _fit_segment(segment: document_types.Segment, image_size: int) -> document_types.Segment:
    if isinstance(segment, document_types.Text):
        return document_types.Text(caption_text.clean(segment.text))
    fitted = [image_files.fit(picture, image_size) for picture in segment.pictures]
    if isinstance(segment, document_types.Image):
        return document_types.Image(fitted[0])
    return document_types.Video(np.stack(fitted), segment.fps)
