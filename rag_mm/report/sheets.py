"""The page's panels as PNG files: contact sheets composed with Pillow, and the curves."""

import io
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from rag_mm.core import files
from rag_mm.report import curves
from rag_mm.report.content import (
    CaptionExample,
    Generation,
    ReportData,
    fact_verdict,
    variant_label,
)

Cell = tuple[str, np.ndarray]  # Label, picture uint8 [H, W, 3].
Row = tuple[Sequence[str], Sequence[Cell]]

_CELL = 96  # Pixels of a cell's side.
_GAP = 12
_LINE = 18
_MAX_CHARACTERS = 120
_PAPER, _INK, _FAINT = (255, 255, 255), (34, 37, 41), (122, 128, 136)
_GOOD, _BAD, _FRAME = (60, 122, 82), (160, 97, 42), (205, 208, 210)
# The story's sheet: two columns of 2 + 2 pictures, 832 pixels in all.
_COLUMN, _GUTTER, _MARGIN, _SMALL_LINE = 402, 18, 5, 14
_FOUND_AT, _DRAWN_AT = (1, _CELL + 5), (2 * _CELL + 13, 3 * _CELL + 17)


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """Rows of labelled pictures under their lines of text.

    Args:
        rows: (lines, cells) from top to bottom, at least one; rows may differ in both. A line
            longer than 120 characters is cut, a label longer than two lines under its picture too.

    Returns:
        An RGB picture on white, wide enough for the longest row and line.
    """
    font, small = _font(13), _font(10)
    texts = [[_one_line(line) for line in lines] for lines, _ in rows]
    widths = [int(font.getlength(line)) for lines in texts for line in lines]
    widths += [len(cells) * (_CELL + _GAP) for _, cells in rows]
    labels = [[_wrapped(label, small, _CELL) for label, _ in cells] for _, cells in rows]
    below = [_LINE + _SMALL_LINE * any(len(label) > 1 for label in each) for each in labels]
    heights = [
        len(lines) * _LINE + _CELL + room + _GAP for lines, room in zip(texts, below, strict=True)
    ]
    sheet = Image.new("RGB", (max(widths) + 2 * _GAP, sum(heights) + 2 * _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for lines, each, (_, cells), height in zip(texts, labels, rows, heights, strict=True):
        for i, line in enumerate(lines):
            draw.text((_GAP, top + i * _LINE), line, fill=_INK, font=font)
        under = top + len(lines) * _LINE + 2
        for j, (label, (_, pixels)) in enumerate(zip(each, cells, strict=True)):
            left = _GAP + j * (_CELL + _GAP)
            sheet.paste(_enlarged(pixels), (left, under))
            for i, line in enumerate(label):
                place = (left, under + _CELL + 2 + i * _SMALL_LINE)
                draw.text(place, line, fill=_FAINT, font=small)
        top += height
    return sheet


def story_sheet(story: Sequence[Generation]) -> Image.Image:
    """The rows of the first screen in two columns: retrieved, ours, vanilla, and the scorer's words.

    Args:
        story: at least one row; pictures are enlarged by whole factors where they are small.

    Returns:
        An RGB picture on white, as wide as a README's column, so that no browser scales it.
    """
    pairs = [story[i : i + 2] for i in range(0, len(story), 2)]
    bands = [[_scene(row, _caption_lines(pair)) for row in pair] for pair in pairs]
    heights = [max(scene.height for scene in band) + _GAP for band in bands]
    width = 2 * _COLUMN + _GUTTER + 2 * _MARGIN
    sheet = Image.new("RGB", (width, _MARGIN + _LINE + sum(heights)), _PAPER)
    draw, top = ImageDraw.Draw(sheet), _MARGIN + _LINE
    for band, height in zip(bands, heights, strict=True):
        for i, scene in enumerate(band):
            sheet.paste(scene, (_MARGIN + i * (_COLUMN + _GUTTER), top))
        top += height
    for i, row in enumerate(story[:2]):
        labels = ["retrieved", *(label for label, _ in row.compared())]
        for offset, label in zip((0, *_DRAWN_AT), labels, strict=False):
            place = (_MARGIN + i * (_COLUMN + _GUTTER) + offset, _MARGIN)
            draw.text(place, label, fill=_FAINT, font=_font(11))
    return sheet


def _scene(row: Generation, num_lines: int) -> Image.Image:
    """One row of the story, its caption given room for so many lines."""
    font, small = _font(11), _font(10)
    verdicts = [
        (fact_verdict(row.right[key]) if key in row.right else "", row.right.get(key, {}))
        for _, key in row.compared()
    ]
    below = num_lines * _SMALL_LINE + 3
    scene = Image.new("RGB", (_COLUMN, below + _CELL + 2 + 2 * _SMALL_LINE), _PAPER)
    draw = ImageDraw.Draw(scene)
    for i, line in enumerate(_wrapped(row.caption, font, _COLUMN)):
        draw.text((0, i * _SMALL_LINE), line, fill=_INK, font=font)
    drawn = [row.drawn[key] for _, key in row.compared()]
    cells = [*zip(_FOUND_AT, row.retrieved, strict=False), *zip(_DRAWN_AT, drawn, strict=False)]
    for offset, pixels in cells:
        picture = _zoomed(pixels)
        # A white card at the edge would run out into the paper.
        frame = (offset - 1, below - 1, offset + picture.width, below + picture.height)
        draw.rectangle(frame, outline=_FRAME)
        scene.paste(picture, (offset, below))
    for offset, (words, right) in zip(_DRAWN_AT, verdicts, strict=False):
        fill = _GOOD if right.get("joint") else _BAD
        for i, line in enumerate(_wrapped(words, small, _CELL)):
            top = below + _CELL + 2 + i * _SMALL_LINE
            draw.text((offset, top), line, fill=fill, font=small)
    return scene


def _caption_lines(story: Sequence[Generation]) -> int:
    return max(len(_wrapped(row.caption, _font(11), _COLUMN)) for row in story)


def save_figures(data: ReportData, folder: epath.PathLike) -> list[epath.Path]:
    """Writes the panels that have content into `folder`, each file whole or not at all.

    Returns:
        The paths written, among story.png, reconstructions.png, retrieval.png, generated.png,
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
    if data.story:
        written.append(_write_picture(folder / "story.png", story_sheet(data.story)))
    for name, rows in panels.items():
        if rows:
            written.append(_write_picture(folder / f"{name}.png", contact_sheet(rows)))
    if data.curves:
        written.append(_write(folder / "curves.png", curves.curves_png(data.curves)))
    return written


def _write_picture(path: epath.Path, picture: Image.Image) -> epath.Path:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return _write(path, buffer.getvalue())


def _write(path: epath.Path, content: bytes) -> epath.Path:
    files.write_atomic(path, content)
    return path


def _written_lines(row: CaptionExample) -> list[str]:
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


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of whole words no longer than `width`, two at most; what is too long is cut."""
    lines = [""]
    for word in _one_line(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 2:
        lines = [lines[0], " ".join(lines[1:])]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"


def _zoomed(pixels: np.ndarray) -> Image.Image:
    """By the largest whole factor that fits a cell, so that every pixel stays a square."""
    picture = Image.fromarray(pixels)
    factor = _CELL // max(picture.size)
    if factor < 1:
        return _enlarged(pixels)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def _enlarged(pixels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(pixels)
    scale = _CELL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return picture.resize(size, smooth)
