"""Renders report.html: one file without scripts or network access.

Jinja escapes all captions; as a second line of defence the page's content security policy forbids scripts
and every request.
"""

import base64
import importlib.resources
import io
import json
from collections.abc import Mapping
from typing import Any

import jinja2
import markupsafe
import numpy as np
from PIL import Image

from rag_mm.report import curves, figures, summary, verdicts
from rag_mm.report.content import FACTS, ReportData, fact_verdict, variant_label

_SIDE = 96  # Pixels on the page; a 32-pixel image is enlarged threefold.
_FACTS = (*FACTS, "joint")
_ROWS = {
    "docs2": "decoder.{}.docs2",
    "docs1": "decoder.{}.docs1",
    "docs0": "decoder.{}.docs0",
    "control": "control.{}",
    "held_out_removed": "baselines.held_out_removed.{}",
    "random_documents": "baselines.random_documents.{}",
    "hit_itself": "baselines.hit_itself.{}",
    "oracle_paste": "baselines.oracle_paste.{}",
    "oracle_documents": "baselines.oracle_documents.{}",
    "counterfactual_documents": "baselines.counterfactual_documents.{}",
    "image_only_documents": "baselines.image_only_documents.{}",
    "text_only_documents": "baselines.text_only_documents.{}",
}


def render_report(data: ReportData) -> str:
    """Renders the page; deterministic.

    Returns:
        HTML to be written as UTF-8; characters that UTF-8 cannot encode are replaced by "?".

    Raises:
        ValueError: an image is not uint8 [H, W, 3].
    """
    here = importlib.resources.files("rag_mm.report")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "label": variant_label,
        "verdict": fact_verdict,
        "nobreak": _nobreak,
    }
    environment.globals |= {"image": image_tag}
    seconds = data.stage_seconds
    html = environment.from_string((here / "page.html.j2").read_text("utf-8")).render(
        data=data,
        css=markupsafe.Markup((here / "page.css").read_text("utf-8")),
        headline=verdicts.headline(data.metrics),
        verdicts=verdicts.verdicts(data.metrics),
        headline_rows=summary.summary_table(data.metrics),
        fact_table=fact_table(data.metrics),
        ceiling=fact_ceiling(data.metrics),
        missing_text=figures.MISSING,
        charts=[
            markupsafe.Markup(curves.chart_svg(title, lines))
            for title, lines in curves.charts(data.curves).items()
        ],
        stage_times=[
            (name, figures.duration(s), 100 * s / max([*seconds.values(), 1e-9]))
            for name, s in seconds.items()
        ],
        total_time=figures.duration(sum(seconds.values())),
        speed=_speed(data.metrics),
        all_metrics=figures.flatten(data.metrics),
        config=json.dumps(data.config, indent=2, sort_keys=True, ensure_ascii=False),
    )
    return html.encode("utf-8", "replace").decode("utf-8")


def image_tag(pixels: np.ndarray, description: str) -> markupsafe.Markup:
    """An `<img>` with inline PNG data, enlarged by an integer factor to about 96 pixels."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected an image uint8 [H, W, 3], got {pixels.dtype} {pixels.shape}")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    height, width = pixels.shape[:2]
    longest = max(height, width)
    zoom = max(1, _SIDE // longest) if longest < 2 * _SIDE else _SIDE / longest
    return markupsafe.Markup(
        '<img src="data:image/png;base64,{}" width="{}" height="{}" alt="{}">'
    ).format(
        base64.b64encode(buffer.getvalue()).decode("ascii"),
        round(width * zoom),
        round(height * zoom),
        description,
    )


Cell = tuple[str, float | None]  # Text, and the length of its bar in percent.


def fact_table(metrics: Mapping[str, Any]) -> list[tuple[str, list[Cell], str]]:
    """Rows (variant, a cell per fact, kernel distance) of the variants that were figures."""
    rows = []
    for key, template in _ROWS.items():
        facts = [figures.find(metrics, template.format(f"{fact}_accuracy")) for fact in _FACTS]
        distance = template.format("kernel_distance") + ".polynomial"
        kernel = figures.find(metrics, distance)
        if any(figure is not None for figure in [*facts, kernel]):
            cells = [_cell(figure) for figure in facts]
            rows.append((variant_label(key), cells, figures.number(kernel, 2)))
    return rows


def fact_ceiling(metrics: Mapping[str, Any]) -> list[Cell]:
    """The scorer's accuracy on tokenizer reconstructions, one cell per fact."""
    return [_cell(figures.find(metrics, f"tokenizer.scorer_ceiling.{fact}")) for fact in _FACTS]


def _cell(figure: figures.Figure | None) -> Cell:
    return figures.percent(figure), None if figure is None else 100 * figure.value


def _nobreak(text: str) -> str:
    """Keeps numbers such as "62.1 % ± 5.9" on one line."""
    for sign in (" %", " ±", "± "):
        text = text.replace(sign, sign.replace(" ", "\N{NO-BREAK SPACE}"))
    return text


def _speed(metrics: Mapping[str, Any]) -> str:
    """The cost of retrieval; empty if it was not figures."""
    names = ("retrieval_ms", "generation_ms", "retrieval_share")
    retrieval, generation, share = (figures.find(metrics, f"quickstart.{name}") for name in names)
    if retrieval is None or generation is None or share is None:
        return ""
    return (
        f"In batched generation, retrieval (caption encoding, search, selection) takes "
        f"{figures.number(retrieval, 2, 'ms')} per image and generation "
        f"{figures.number(generation, 1, 'ms')}: retrieval is {figures.percent(share)} of the total."
    )
