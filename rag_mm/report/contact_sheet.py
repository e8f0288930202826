"""Hits of one search as a page to look at: pictures with scores, texts and where they come from."""

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2


def render(asked: str, view: str, hits: Sequence[Mapping[str, Any]]) -> str:
    """A page of HTML that needs nothing else; what documents say is escaped.

    Args:
        asked: what was searched for.
        view: which embedding was searched.
        hits: best first, as `memory.hits.describe` gives them.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files("rag_mm.report").joinpath("contact_sheet.html.j2").read_text()
    return environment.from_string(template).render(asked=asked, view=view, hits=hits)
