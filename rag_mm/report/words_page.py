"""The HTML page of an autoencoder of words: figures by level, test images as words, training curves."""

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import markupsafe

from rag_mm.core.code_grids import Grids
from rag_mm.report import curves, word_figure
from rag_mm.report.content import Curve

# Of a full grid: runs that reconstruct well use more words; an encoder that collapsed used 9 % of 1,024.
HEALTHY_USAGE = 0.25
# Lengths of latents over those of words, and what the last level may leave of their squares.
HEALTHY_NORM, HEALTHY_ERROR = (0.5, 2.0), 0.3
_SCORE = "relative_score_"
NOTE = (
    "Usage is the share of the codebook that a level uses on test images, perplexity the number of equally "
    "frequent words with the same entropy. A level that is a full grid is healthy at a usage of at least "
    f"{HEALTHY_USAGE:.0%}; below, most words are dead, as after a start near zero. The latent norm, at the "
    "end of training, is the length of the vectors that a level quantizes over that of the words' vectors: "
    f"healthy at {HEALTHY_NORM[0]:g} to {HEALTHY_NORM[1]:g}, and elsewhere the words are too long or too "
    "short for them. The latent error is the share of the latents' squares that the words so far leave: "
    f"healthy at {HEALTHY_ERROR:g} or less on the last level. Images decoded from levels coarser than the "
    "full grid are no pictures: positions without a word are zero."
)


@dataclasses.dataclass(frozen=True)
class LevelTable:
    """Head and rows of texts, and a note below."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


def level_table(
    metrics: Mapping[str, Any], grids: Grids, logged: Mapping[str, float]
) -> LevelTable:
    """The table of the metrics of a stage `spae` whose images have these grids.

    Args:
        metrics: of the stage.
        grids: of the codes of an image.
        logged: the last figures of its log, such as `latent_norm_level1`; a single level has none.
    """
    words = metrics.get("words", {})
    head = ["level", "PSNR of the levels so far, dB", "words used", "usage", "perplexity"]
    has_latents = "latent_norm_level1" in logged
    head += ["latent norm", "latent error"] if has_latents else []
    # One column for each kind of features of words that was measured.
    scores = [name for name in words.get("level1", {}) if name.startswith(_SCORE)]
    named = [f"relative score, {name.removeprefix(_SCORE).replace('_', ' ')}" for name in scores]
    named += ["any word in the image's name"] if words else []
    rows = []
    for number, grid in enumerate(grids, 1):
        name = f"level{number}"
        # A single level has the figures of all codes.
        found = metrics.get(name, metrics)
        usage = found["code_usage"]
        is_low = usage < HEALTHY_USAGE and grid == grids[-1]
        row = [
            f"{number}: {grid[0]} x {grid[1]}",
            f"{found['psnr']:.1f}",
            str(found.get("words", "")),
            f"{'low: ' if is_low else ''}{usage:.0%}",
            f"{found['perplexity']:.0f}",
        ]
        if has_latents:
            row += _latent_cells(logged, name, is_last=number == len(grids))
        if words:
            own = words[name]
            row += [*(f"{own[score]:.2f}" for score in scores), f"{own['named']:.0%}"]
        rows.append(row)
    return LevelTable([*head, *named], rows, NOTE)


def _latent_cells(logged: Mapping[str, float], level: str, is_last: bool) -> list[str]:
    """Norm and error of the latents at a level, marked where they are not healthy."""
    norm, error = (logged.get(f"latent_{name}_{level}", math.nan) for name in ("norm", "error"))
    low, high = HEALTHY_NORM
    mark = "low: " if norm < low else "high: " if norm > high else ""
    return [
        f"{mark}{norm:.2f}",
        f"{'high: ' if is_last and error > HEALTHY_ERROR else ''}{error:.2f}",
    ]


def render(
    title: str,
    lead: str,
    metrics: Mapping[str, Any],
    grids: Grids,
    logged: Mapping[str, float],
    pictures: Mapping[str, word_figure.WordedImage],
    lines: Sequence[Curve],
) -> str:
    """A self-contained HTML page without scripts; all texts are escaped.

    Args:
        title: heading.
        lead: first paragraph.
        metrics: of the stage `spae`.
        grids: of the codes of an image.
        logged: see `level_table`.
        pictures: images as words, by caption.
        lines: training curves.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("rag_mm.report").joinpath("words.html.j2").read_text("utf-8")
    shown = [
        {"caption": caption, "source": _data_url(word_figure.words_png(worded))}
        for caption, worded in pictures.items()
    ]
    charts = [
        markupsafe.Markup(curves.chart_svg(name, group))
        for name, group in curves.charts(lines).items()
    ]
    return environment.from_string(template).render(
        title=title,
        lead=lead,
        table=level_table(metrics, grids, logged),
        pictures=shown,
        charts=charts,
    )


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
