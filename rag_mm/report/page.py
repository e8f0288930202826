"""Renders report.html: one file that needs no network and runs no script.

Strangers' captions are escaped by Jinja; a content policy in the page forbids scripts and every
fetch, should something slip through all the same.
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

from rag_mm.report import curves, summary, verdicts
from rag_mm.report import figures as measured
from rag_mm.report.content import FACTS, ReportData, fact_verdict, variant_label

_SIDE = 96  # Pixels on the page; a 32-pixel picture is enlarged threefold.
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
    """The whole page as text, the same for the same data.

    Returns:
        HTML to be written as UTF-8; characters that UTF-8 cannot hold are replaced by "?".

    Raises:
        ValueError: a picture is not uint8 [H, W, 3].
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
    environment.globals |= {"picture": picture_tag}
    seconds = data.stage_seconds
    html = environment.from_string((here / "page.html.j2").read_text("utf-8")).render(
        data=data,
        css=markupsafe.Markup((here / "page.css").read_text("utf-8")),
        headline=verdicts.headline(data.metrics),
        verdicts=verdicts.verdicts(data.metrics),
        headline_rows=summary.summary_table(data.metrics),
        fact_table=fact_table(data.metrics),
        ceiling=fact_ceiling(data.metrics),
        missing_text=measured.MISSING,
        charts=[
            markupsafe.Markup(curves.chart_svg(title, lines))
            for title, lines in curves.charts(data.curves).items()
        ],
        stage_times=[
            (name, measured.duration(s), 100 * s / max([*seconds.values(), 1e-9]))
            for name, s in seconds.items()
        ],
        total_time=measured.duration(sum(seconds.values())),
        speed=_speed(data.metrics),
        all_metrics=measured.flatten(data.metrics),
        config=json.dumps(data.config, indent=2, sort_keys=True, ensure_ascii=False),
    )
    return html.encode("utf-8", "replace").decode("utf-8")


def picture_tag(pixels: np.ndarray, description: str) -> markupsafe.Markup:
    """An `<img>` with the picture inside it, enlarged by a whole factor to about 96 pixels."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [H, W, 3], not {pixels.dtype} {pixels.shape}")
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
    """Rows (variant, a cell per fact, kernel distance); one with nothing measured is left out."""
    rows = []
    for key, template in _ROWS.items():
        figures = [measured.find(metrics, template.format(f"{fact}_accuracy")) for fact in _FACTS]
        distance = template.format("kernel_distance") + ".polynomial"
        kernel = measured.find(metrics, distance)
        if any(figure is not None for figure in [*figures, kernel]):
            cells = [_cell(figure) for figure in figures]
            rows.append((variant_label(key), cells, measured.number(kernel, 2)))
    return rows


def fact_ceiling(metrics: Mapping[str, Any]) -> list[Cell]:
    """The scorer's accuracy on tokenizer reconstructions, a cell per fact."""
    return [_cell(measured.find(metrics, f"tokenizer.scorer_ceiling.{fact}")) for fact in _FACTS]


def _cell(figure: measured.Figure | None) -> Cell:
    return measured.percent(figure), None if figure is None else 100 * figure.value


def _nobreak(text: str) -> str:
    """A figure in running text stays on one line: "62.1 % ± 5.9"."""
    for sign in (" %", " ±", "± "):
        text = text.replace(sign, sign.replace(" ", "\N{NO-BREAK SPACE}"))
    return text


def _speed(metrics: Mapping[str, Any]) -> str:
    """What looking things up costs; empty where it was not measured."""
    names = ("retrieval_ms", "generation_ms", "retrieval_share")
    found, drawn, share = (measured.find(metrics, f"quickstart.{name}") for name in names)
    if found is None or drawn is None or share is None:
        return ""
    return (
        f"Asked for many pictures at once, finding the documents for one (encoding its caption, "
        f"search, selection) takes {measured.number(found, 2, 'ms')} and drawing it after reading "
        f"them {measured.number(drawn, 1, 'ms')}: retrieval is {measured.percent(share)} of both."
    )
