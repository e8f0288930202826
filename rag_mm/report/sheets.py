"""The page's panels as PNG files: contact sheets composed with Pillow, and the curves."""

import io
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from rag_mm.core import files
from rag_mm.report import curves
from rag_mm.report.content import ReportData, WrittenCaption, variant_label

Cell = tuple[str, np.ndarray]  # Label, picture uint8 [H, W, 3].
Row = tuple[Sequence[str], Sequence[Cell]]

_CELL = 96  # Pixels of a cell's side.
_GAP = 12
_LINE = 18
_MAX_CHARACTERS = 120
_PAPER, _INK, _FAINT = (255, 255, 255), (34, 37, 41), (122, 128, 136)


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """Rows of labelled pictures under their lines of text.

    Args:
        rows: (lines, cells) from top to bottom, at least one; rows may differ in both. A line
            longer than 120 characters is cut.

    Returns:
        An RGB picture on white, wide enough for the longest row and line.
    """
    font, small = _font(13), _font(10)
    texts = [[_one_line(line) for line in lines] for lines, _ in rows]
    widths = [int(font.getlength(line)) for lines in texts for line in lines]
    widths += [len(cells) * (_CELL + _GAP) for _, cells in rows]
    heights = [len(lines) * _LINE + _CELL + _LINE + _GAP for lines in texts]
    sheet = Image.new("RGB", (max(widths) + 2 * _GAP, sum(heights) + 2 * _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for lines, (_, cells), height in zip(texts, rows, heights, strict=True):
        for i, line in enumerate(lines):
            draw.text((_GAP, top + i * _LINE), line, fill=_INK, font=font)
        below = top + len(lines) * _LINE + 2
        for j, (label, pixels) in enumerate(cells):
            left = _GAP + j * (_CELL + _GAP)
            sheet.paste(_enlarged(pixels), (left, below))
            draw.text((left, below + _CELL + 2), _one_line(label), fill=_FAINT, font=small)
        top += height
    return sheet


def save_figures(data: ReportData, folder: epath.PathLike) -> list[epath.Path]:
    """Writes the panels that have content into `folder`, each file whole or not at all.

    Returns:
        The paths written, among reconstructions.png, retrieval.png, generated.png,
        captions.png and curves.png.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = epath.Path(folder)
    panels = {
        "reconstructions": [
            ([row.caption], [("original", row.original), ("from codes", row.reconstruction)])
            for row in data.reconstructions
        ],
        "retrieval": [
            ([row.query], [(f"{hit.score:.2f}", hit.image) for hit in row.hits])
            for row in data.retrievals
        ],
        "generated": [
            (
                [row.caption],
                [("original", row.original)]
                + [(f"retrieved {i + 1}", hit) for i, hit in enumerate(row.retrieved)]
                + [(variant_label(key), pixels) for key, pixels in row.drawn.items()],
            )
            for row in data.generations
        ],
        "captions": [(_written_lines(row), [("", row.image)]) for row in data.captions],
    }
    written = []
    for name, rows in panels.items():
        if rows:
            buffer = io.BytesIO()
            contact_sheet(rows).save(buffer, format="PNG")
            written.append(_write(folder / f"{name}.png", buffer.getvalue()))
    if data.curves:
        written.append(_write(folder / "curves.png", curves.curves_png(data.curves)))
    return written


def _write(path: epath.Path, content: bytes) -> epath.Path:
    files.write_atomic(path, content)
    return path


def _written_lines(row: WrittenCaption) -> list[str]:
    return [f"truth: {row.truth}"] + [
        f"{variant_label(key)}: {text or '(nothing)'}" for key, text in row.written.items()
    ]


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's own font knows ASCII only; matplotlib brings one with all of Latin ("Côte d’Ivoire").
    import matplotlib

    return ImageFont.truetype(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf", size)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_CHARACTERS else line[: _MAX_CHARACTERS - 1] + "…"


def _enlarged(pixels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(pixels)
    scale = _CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return picture.resize(size, smooth)
