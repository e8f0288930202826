"""Training curves as small charts: inline SVG for the page, PNG for the figures folder."""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rag_mm.report.content import Curve

if TYPE_CHECKING:  # Importing matplotlib takes a second, so it is imported where needed.
    from matplotlib import figure

# Distinguishable by lightness as well as by hue; readable on white and on near-black.
_LINES = ("#3f7cac", "#c98a3a", "#7a9e6b", "#a2658f", "#8a8f98")
_INK = "#010203"  # Placeholder, replaced by the page's text color.
_MAX_POINTS = 300  # More would share pixels.


def charts(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Curves by chart title, both in order of first appearance."""
    grouped: dict[str, list[Curve]] = {}
    for curve in curves:
        grouped.setdefault(curve.chart, []).append(curve)
    return grouped


def chart_svg(title: str, lines: Sequence[Curve]) -> str:
    """One chart as an `<svg>` element that inherits the page's text color and font; deterministic."""
    import matplotlib

    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    buffer = io.StringIO()
    with matplotlib.rc_context(style):
        drawing = _figure([(title, lines)], _INK)
        drawing.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # Ids must be unique on a page with several charts; nothing refers to these.
    text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text)
    text = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", text)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', text, count=1)


def curves_png(curves: Sequence[Curve]) -> bytes:
    """All charts, stacked, as one PNG on white."""
    buffer = io.BytesIO()
    drawing = _figure(list(charts(curves).items()), "#30343a")
    drawing.savefig(buffer, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _figure(panels: Sequence[tuple[str, Sequence[Curve]]], ink: str) -> "figure.Figure":
    # The object interface instead of pyplot: no global state, no backend selection.
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(4.6, 2.6 * len(panels)), layout="constrained")
    backend_agg.FigureCanvasAgg(drawing)
    all_axes = drawing.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (title, lines) in zip(all_axes, panels, strict=True):
        for i, line in enumerate(lines):
            color = _LINES[i % len(_LINES)]
            if (band := line.band) is not None:
                axes.fill_between(
                    band.steps, band.low, band.high, color=color, alpha=0.22, linewidth=0
                )
            axes.plot(*_thin(line), color=color, linewidth=1.5)
        # An unescaped `$` starts a formula.
        labels = [line.label.replace("$", r"\$") for line in lines]
        axes.legend(axes.lines, labels, frameon=False, labelcolor=ink, fontsize=8)
        axes.set_title(title.replace("$", r"\$"), loc="left", color=ink, fontsize=10)
        axes.set_xlabel("step", color=ink, fontsize=8)
        axes.tick_params(colors=ink, labelsize=8, length=2, width=0.5)
        axes.grid(axis="y", color=ink, alpha=0.12, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set(color=ink, linewidth=0.5, alpha=0.4)
    return drawing


def _thin(line: Curve) -> tuple[np.ndarray, np.ndarray]:
    steps, values = np.asarray(line.steps, np.float64), np.asarray(line.values, np.float64)
    if len(steps) != len(values):
        raise ValueError(f"{line.chart}, {line.label}: {len(steps)} steps, {len(values)} values")
    if len(steps) <= _MAX_POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), _MAX_POINTS)
    return (
        np.array([steps[part].mean() for part in parts]),
        np.array([values[part].mean() for part in parts]),
    )
