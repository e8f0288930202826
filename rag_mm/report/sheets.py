"""The page's panels as PNG files: contact sheets composed with Pillow, and the training curves."""

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

Cell = tuple[str, np.ndarray]  # Label, image uint8 [H, W, 3].
Row = tuple[Sequence[str], Sequence[Cell]]

_CELL = 96  # Pixels of a cell's side.
_GAP = 12
_LINE = 18
_MAX_CHARACTERS = 120
_PAPER, _INK, _FAINT = (255, 255, 255), (34, 37, 41), (122, 128, 136)
_GOOD, _BAD, _FRAME = (60, 122, 82), (160, 97, 42), (205, 208, 210)
# The overview: two columns of 2 + 2 images, 832 pixels in total.
_COLUMN, _GUTTER, _MARGIN, _SMALL_LINE = 402, 18, 5, 14
_HIT_OFFSETS, _IMAGE_OFFSETS = (1, _CELL + 5), (2 * _CELL + 13, 3 * _CELL + 17)


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """Rows of labeled images under their lines of text.

    Args:
        rows: at least one (lines, cells), top to bottom; rows may differ in both. Lines are truncated at 120
            characters, labels at two lines under their image.

    Returns:
        An RGB image on white, wide enough for the widest row or line.
    """
    font, small = _font(13), _font(10)
    texts = [[_one_line(line) for line in lines] for lines, _ in rows]
    widths = [int(font.getlength(line)) for lines in texts for line in lines]
    widths += [len(cells) * (_CELL + _GAP) for _, cells in rows]
    labels = [[_wrapped(label, small, _CELL) for label, _ in cells] for _, cells in rows]
    below = [
        _LINE + _SMALL_LINE * any(len(label) > 1 for label in row_labels) for row_labels in labels
    ]
    heights = [
        len(lines) * _LINE + _CELL + room + _GAP for lines, room in zip(texts, below, strict=True)
    ]
    sheet = Image.new("RGB", (max(widths) + 2 * _GAP, sum(heights) + 2 * _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _GAP
    for lines, row_labels, (_, cells), height in zip(texts, labels, rows, heights, strict=True):
        for i, line in enumerate(lines):
            draw.text((_GAP, top + i * _LINE), line, fill=_INK, font=font)
        image_top = top + len(lines) * _LINE + 2
        for j, (label, (_, pixels)) in enumerate(zip(row_labels, cells, strict=True)):
            left = _GAP + j * (_CELL + _GAP)
            sheet.paste(_enlarged(pixels), (left, image_top))
            for i, line in enumerate(label):
                position = (left, image_top + _CELL + 2 + i * _SMALL_LINE)
                draw.text(position, line, fill=_FAINT, font=small)
        top += height
    return sheet


def story_sheet(story: Sequence[Generation]) -> Image.Image:
    """The overview in two columns: retrieved documents, with retrieval, baseline, and the verdicts.

    Args:
        story: at least one example; small images are enlarged by integer factors.

    Returns:
        An RGB image on white, 832 pixels wide like a README's column, so that browsers do not rescale it.
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
        for offset, label in zip((0, *_IMAGE_OFFSETS), labels, strict=False):
            position = (_MARGIN + i * (_COLUMN + _GUTTER) + offset, _MARGIN)
            draw.text(position, label, fill=_FAINT, font=_font(11))
    return sheet


def _scene(row: Generation, num_lines: int) -> Image.Image:
    """One example of the overview, with space for `num_lines` caption lines."""
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
    images = [row.drawn[key] for _, key in row.compared()]
    cells = [
        *zip(_HIT_OFFSETS, row.retrieved, strict=False),
        *zip(_IMAGE_OFFSETS, images, strict=False),
    ]
    for offset, pixels in cells:
        image = _zoomed(pixels)
        # Without a frame, a white card at the edge would merge with the background.
        frame = (offset - 1, below - 1, offset + image.width, below + image.height)
        draw.rectangle(frame, outline=_FRAME)
        scene.paste(image, (offset, below))
    for offset, (verdict, right) in zip(_IMAGE_OFFSETS, verdicts, strict=False):
        fill = _GOOD if right.get("joint") else _BAD
        for i, line in enumerate(_wrapped(verdict, small, _CELL)):
            top = below + _CELL + 2 + i * _SMALL_LINE
            draw.text((offset, top), line, fill=fill, font=small)
    return scene


def _caption_lines(story: Sequence[Generation]) -> int:
    return max(len(_wrapped(row.caption, _font(11), _COLUMN)) for row in story)


def save_figures(data: ReportData, folder: epath.PathLike) -> list[epath.Path]:
    """Writes the non-empty panels into `folder`, each file atomically.

    Returns:
        The paths written, a subset of story.png, reconstructions.png, retrieval.png, generated.png,
        captions.png and curves.png.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = epath.Path(folder)
    panels = {
        "reconstructions": [
            ([row.caption], [("original", row.original), ("reconstruction", row.reconstruction)])
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
        "captions": [(_caption_texts(row), [("", row.image)]) for row in data.captions],
    }
    written = []
    if data.story:
        written.append(_write_image(folder / "story.png", story_sheet(data.story)))
    for name, rows in panels.items():
        if rows:
            written.append(_write_image(folder / f"{name}.png", contact_sheet(rows)))
    if data.curves:
        written.append(_write(folder / "curves.png", curves.curves_png(data.curves)))
    return written


def _write_image(path: epath.Path, image: Image.Image) -> epath.Path:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return _write(path, buffer.getvalue())


def _write(path: epath.Path, content: bytes) -> epath.Path:
    files.write_atomic(path, content)
    return path


def _caption_texts(row: CaptionExample) -> list[str]:
    return [f"reference: {row.truth}"] + [
        f"{variant_label(key)}: {text or '(empty)'}" for key, text in row.written.items()
    ]


def _font(size: int) -> ImageFont.FreeTypeFont:
    # Pillow's built-in font is ASCII only; matplotlib ships one that covers Latin ("Côte d’Ivoire").
    import matplotlib

    return ImageFont.truetype(matplotlib.get_data_path() + "/fonts/ttf/DejaVuSans.ttf", size)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_CHARACTERS else line[: _MAX_CHARACTERS - 1] + "…"


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """At most two lines of whole words no wider than `width`; longer text is truncated."""
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
    """Enlarged by the largest integer factor that fits a cell, so that every pixel stays square."""
    image = Image.fromarray(pixels)
    factor = _CELL // max(image.size)
    if factor < 1:
        return _enlarged(pixels)
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)


def _enlarged(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    scale = _CELL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    resampling = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return image.resize(size, resampling)
