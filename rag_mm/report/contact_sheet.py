"""The hits of one search as an HTML page: images with scores, texts and provenance."""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2


def render(query: str, view: str, hits: Sequence[Mapping[str, Any]]) -> str:
    """A self-contained HTML page; all document text is escaped.

    Args:
        query: the query as the user gave it.
        view: the view that was searched.
        hits: best first, as returned by `memory.hits.describe`.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files("rag_mm.report").joinpath("contact_sheet.html.j2").read_text()
    return environment.from_string(template).render(query=query, view=view, hits=hits)
