"""An image as words: the words of each level in their cells, and the image decoded from each prefix."""

import dataclasses
import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # Importing matplotlib takes a second, so it is imported where needed.
    from matplotlib.axes import Axes

_INK, _FAINT, _FRAME = "#222529", "#7a8088", "#cdd0d2"
_COLORS = "BrBG"  # Told apart with any color vision; its middle is nearly white.
_NO_SCORE = "#f3f4f5"
_PANEL_INCHES = 2.6
_MAX_NAMED = 16  # Cells per row that have space for a word.
_CELL_INCHES = 0.42
_DPI = 160


@dataclasses.dataclass(frozen=True, eq=False)
class WordLevel:
    """One level of an image's words.

    Attributes:
        words: [rows][columns], in their cells.
        scores: relative score of each, float [rows, columns] in 0..1, or None.
        prefix: number of words up to this level.
        decoded: uint8 [H, W, 3], the image decoded from them.
        psnr: of that, in dB.
    """

    words: tuple[tuple[str, ...], ...]
    scores: np.ndarray | None
    prefix: int
    decoded: np.ndarray
    psnr: float


@dataclasses.dataclass(frozen=True, eq=False)
class WordedImage:
    """An image, uint8 [H, W, 3], and its levels, coarse to fine."""

    image: np.ndarray
    levels: tuple[WordLevel, ...]


def words_png(shown: WordedImage) -> bytes:
    """A PNG on white: a column per level, its words above and the image of all words so far below.

    Cells are colored by relative score, from brown (0) to green (1). Above 16 cells per row only the colors
    are drawn.
    """
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure

    sides = [_PANEL_INCHES, *(_side(level) for level in shown.levels)]
    tallest = max(sides)
    drawing = Figure(
        figsize=(sum(sides) + 0.9, tallest + _PANEL_INCHES + 0.5), layout="constrained"
    )
    backend_agg.FigureCanvasAgg(drawing)
    axes = drawing.subplots(
        2,
        len(sides),
        squeeze=False,
        width_ratios=sides,
        height_ratios=(tallest, _PANEL_INCHES),
    )
    _show_image(axes[0, 0], shown.image, "image")
    axes[1, 0].set_axis_off()
    for number, level in enumerate(shown.levels, 1):
        _show_words(axes[0, number], level, f"level {number}")
        count = f"{level.prefix} word{'s' * (level.prefix > 1)}"
        _show_image(axes[1, number], level.decoded, f"{count}: {level.psnr:.1f} dB")
    _show_scale(drawing, axes, any(level.scores is not None for level in shown.levels))
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _side(level: WordLevel) -> float:
    columns = len(level.words[0])
    return max(_PANEL_INCHES, _CELL_INCHES * columns if columns <= _MAX_NAMED else 0)


def _bare(axes: "Axes", title: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, loc="left", color=_INK, fontsize=9)
    for spine in axes.spines.values():
        spine.set(color=_FRAME, linewidth=0.6)


def _show_image(axes: "Axes", pixels: np.ndarray, title: str) -> None:
    axes.imshow(pixels, interpolation="nearest")
    axes.set_anchor("NW")
    _bare(axes, title)


def _show_words(axes: "Axes", level: WordLevel, title: str) -> None:
    import matplotlib

    rows, columns = len(level.words), len(level.words[0])
    if level.scores is None:
        colors = np.full((rows, columns, 4), matplotlib.colors.to_rgba(_NO_SCORE))
    else:
        colors = matplotlib.colormaps[_COLORS](np.clip(level.scores, 0, 1))
    axes.imshow(colors, interpolation="nearest")
    axes.set_anchor("NW")
    _bare(axes, title)
    if columns > _MAX_NAMED:
        return
    for edge in range(1, columns):
        axes.axvline(edge - 0.5, color="white", linewidth=0.6)
    for edge in range(1, rows):
        axes.axhline(edge - 0.5, color="white", linewidth=0.6)
    cell_points = 72 * 0.85 * _side(level) / columns
    for row, names in enumerate(level.words):
        for column, word in enumerate(names):
            is_dark = colors[row, column, :3] @ (0.3, 0.6, 0.1) < 0.5
            axes.text(
                column,
                row,
                word.replace("$", r"\$"),
                ha="center",
                va="center",
                color="white" if is_dark else _INK,
                fontsize=min(13.0, 0.25 * cell_points, cell_points / _ems(word)),
            )


def _ems(word: str) -> float:
    """The width of a word in units of its font size."""
    from matplotlib.textpath import TextPath

    return max(float(TextPath((0, 0), word.replace("$", r"\$"), size=1).get_extents().width), 0.1)


def _show_scale(drawing: Any, axes: Any, has_scores: bool) -> None:
    """The scale of relative scores beneath the image."""
    import matplotlib

    if not has_scores:
        axes[1, 0].text(0, 1, "no retriever: no scores", color=_FAINT, fontsize=8, va="top")
        return
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), _COLORS)
    place = axes[1, 0].inset_axes((0.0, 0.86, 0.9, 0.06))
    bar = drawing.colorbar(scale, cax=place, orientation="horizontal")
    bar.set_label("relative score of the word", color=_INK, fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_INK, labelsize=8, length=2, width=0.5)
