"""The HTML page of an Emu: claims, figures by documents, images found by captions, captions, curves."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import markupsafe
import numpy as np

from rag_mm.core import image_files
from rag_mm.report import curves, emu_verdicts, figures
from rag_mm.report.content import Curve

_SIDE = 64  # Pixels on the page.
DOCUMENTS = {
    "none": "no document",
    "oracle": "document of its class",
    "retrieved": "retrieved document",
    "wrong": "document of another class",
    "shuffled": "another's caption",
    "encoded": "the image's own codes",
}
# Figure -> its name on the page, {} for the number of candidates, and whether it is a share.
FIGURES = {
    "r2": ("R2 of the rollout", False),
    "random": ("right of {} test images", True),
    "own": ("right of {} scenes of its class", True),
    "same": ("right of {} of one place and color", True),
    "read_entity": ("entity read from the rollout", True),
    "read_place": ("place read from the rollout", True),
    "read_color": ("color read from the rollout", True),
    "exact": ("caption exact", True),
    "named": ("caption: name", True),
    "place": ("caption: place", True),
    "color": ("caption: color", True),
    "caption_nll": ("NLL of the caption, nats a token", False),
}
NOTE = (
    "A rollout is the codes that are predicted from a caption. Read means: by the scorer, from the picture "
    "that a linear map makes of them. Documents stand before captions and images, one each; they are "
    "retrieved by what is given, the caption or the image."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """A caption, and by documents the nearest images, uint8 [K, H, W, 3], and the place of its own, or -1."""

    caption: str
    nearest: Mapping[str, tuple[np.ndarray, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Written:
    """An image uint8 [H, W, 3], its caption, and what was written by documents."""

    image: np.ndarray
    caption: str
    texts: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class FigureTable:
    """Title, head and rows of texts, the first cell of each its name, and a note below."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


def figure_table(title: str, found: Mapping[str, Any]) -> FigureTable:
    """The figures of a split by documents; what was not measured is left empty."""
    head = [key for key in DOCUMENTS if any(key in found.get(name, {}) for name in FIGURES)]
    rows = []
    for name, (label, is_share) in FIGURES.items():
        show = figures.percent if is_share else figures.number
        cells = (figures.find(found, f"{name}.{key}") for key in head)
        label = label.format(found.get("candidates", {}).get(name, "several"))
        rows.append([label, *("" if cell is None else show(cell) for cell in cells)])
    return FigureTable(title, [DOCUMENTS[key] for key in head], rows, NOTE)


def render(
    title: str,
    lead: str,
    metrics: Mapping[str, Any],
    found: Sequence[Found],
    written: Sequence[Written],
    lines: Sequence[Curve],
) -> str:
    """A self-contained HTML page without scripts; all texts are escaped.

    Args:
        title: heading.
        lead: first paragraph.
        metrics: of the run.
        found: images that rollouts find.
        written: captions of images.
        lines: training curves.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("rag_mm.report").joinpath("emu.html.j2").read_text("utf-8")
    measured = metrics.get("emu_figures", {})
    names = {"held_out": "Held-out classes", "seen": "Seen classes"}
    keys = list(found[0].nearest) if found else []
    text_keys = list(written[0].texts) if written else []
    return environment.from_string(template).render(
        title=title,
        lead=lead,
        claims=emu_verdicts.claims(metrics),
        tables=[
            figure_table(name, measured[split])
            for split, name in names.items()
            if split in measured
        ],
        num_candidates=measured.get("held_out", {}).get("candidates", {}).get("random", "several"),
        found_head=[DOCUMENTS[key] for key in keys],
        found=[
            {"caption": each.caption, "cells": [_pictures(*each.nearest[key]) for key in keys]}
            for each in found
        ],
        written_head=[DOCUMENTS[key] for key in text_keys],
        written=[
            {
                "picture": _picture(each.image, False),
                "caption": each.caption,
                "texts": [each.texts[key] for key in text_keys],
            }
            for each in written
        ],
        charts=[
            markupsafe.Markup(curves.chart_svg(name, group))
            for name, group in curves.charts(lines).items()
        ],
    )


def _pictures(images: np.ndarray, own: int) -> list[markupsafe.Markup]:
    return [_picture(pixels, place == own) for place, pixels in enumerate(images)]


def _picture(pixels: np.ndarray, is_right: bool) -> markupsafe.Markup:
    data = base64.b64encode(image_files.encode_png(pixels)).decode()
    return markupsafe.Markup('<img src="data:image/png;base64,{}" width="{}" alt=""{}>').format(
        data, _SIDE, markupsafe.Markup(' class="right"') if is_right else ""
    )
