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
        hits: best first, each with `id`, `score`, `text`, `image` (a data URL or None), `url` and
            `license`.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = resources.files("rag_mm.report").joinpath("contact_sheet.html.j2").read_text()
    shown = [{**hit, "link": _link(hit["url"])} for hit in hits]
    return environment.from_string(template).render(asked=asked, view=view, hits=shown)


def _link(url: str | None) -> str | None:
    """The address where it leads to a page; a stranger's may run a script instead."""
    return url if url is not None and url.lower().startswith(("http://", "https://")) else None
