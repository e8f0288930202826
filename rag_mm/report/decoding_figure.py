"""The sweep of guidance as a picture: joint accuracy by weight and temperature, a column per null prompt."""

import dataclasses
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # Importing matplotlib takes a second, so it is imported where needed.
    from matplotlib.axes import Axes

_INK, _FRAME = "#222529", "#cdd0d2"
_COLORS = "YlGnBu"  # From light to dark, also in gray.
# Told apart by lightness as well as by hue.
_LINES = ("#3f7cac", "#c98a3a", "#7a9e6b", "#a2658f", "#8a8f98")
_COLUMN_INCHES, _DPI = 3.9, 150


@dataclasses.dataclass(frozen=True, eq=False)
class SweepGrid:
    """One null prompt's sweep.

    Attributes:
        title: what the null prompt reads.
        temperatures, weights: the rows and columns.
        joint: joint accuracy, float [T, W] in 0..1.
        error: its standard errors, float [T, W].
    """

    title: str
    temperatures: Sequence[float]
    weights: Sequence[float]
    joint: np.ndarray
    error: np.ndarray


def sweep_png(grids: Sequence[SweepGrid]) -> bytes:
    """A PNG on white: above, every cell's joint accuracy; below, the same over the weight ± a standard error.

    The column of weight 1, which is plain sampling, is framed.
    """
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(_COLUMN_INCHES * len(grids), 4.6), layout="constrained")
    backend_agg.FigureCanvasAgg(drawing)
    axes = drawing.subplots(2, len(grids), squeeze=False, height_ratios=(1, 1.5))
    for column, grid in enumerate(grids):
        _show_grid(axes[0, column], grid)
        _show_curves(axes[1, column], grid)
        if column:
            axes[1, column].sharey(axes[1, 0])
    axes[1, 0].set_ylabel("joint accuracy", color=_INK, fontsize=9)
    axes[1, -1].legend(frameon=False, fontsize=8, labelcolor=_INK)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _show_grid(axes: "Axes", grid: SweepGrid) -> None:
    from matplotlib import patches

    axes.imshow(grid.joint, cmap=_COLORS, vmin=0, vmax=1, aspect="auto")
    axes.set_title(grid.title, loc="left", color=_INK, fontsize=9)
    axes.set_xticks(range(len(grid.weights)), [f"{weight:g}" for weight in grid.weights])
    axes.set_yticks(range(len(grid.temperatures)), [f"T {each:g}" for each in grid.temperatures])
    axes.tick_params(colors=_INK, labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set(color=_FRAME, linewidth=0.6)
    for (row, column), share in np.ndenumerate(grid.joint):
        text = f"{share:.2f}".removeprefix("0") if share < 1 else "1"
        color = "white" if share > 0.5 else _INK
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    if 1 in grid.weights:
        at = list(grid.weights).index(1) - 0.5
        frame = patches.Rectangle(
            (at, -0.5), 1, len(grid.temperatures), fill=False, edgecolor=_INK, linewidth=1.4
        )
        frame.set_clip_on(False)
        axes.add_patch(frame)


def _show_curves(axes: "Axes", grid: SweepGrid) -> None:
    for row, temperature in enumerate(grid.temperatures):
        axes.errorbar(
            grid.weights,
            grid.joint[row],
            yerr=grid.error[row],
            color=_LINES[row % len(_LINES)],
            linewidth=1.5,
            elinewidth=0.8,
            marker="o",
            markersize=3,
            label=f"temperature {temperature:g}",
        )
    axes.set_ylim(0, 1)
    axes.set_xlabel("guidance weight", color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=8, length=2, width=0.5)
    axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=_FRAME, linewidth=0.6)
