"""Renders the emoji sheet and its index from Google's Noto Color Emoji font (OFL-1.1).

    python -m rag_mm.worlds.emoji.render --font=NotoColorEmoji.ttf --out=rag_mm/worlds/emoji

The shipped sheet was made with Debian's package fonts-noto-color-emoji 2.042 and the Python package `emoji`,
which only this script needs. The same versions of font, `emoji` and Pillow give the same bytes.
"""

import argparse
import dataclasses
import io
from collections.abc import Iterator, Sequence

from etils import epath
from PIL import Image, ImageDraw, ImageFont, features

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.worlds.emoji import art, classes, names

CELL = 64
COLUMNS = 44  # Makes the sheet of 1,899 cells square.
QUALITY = 90
FONT_SIZE = 109  # The only size of this bitmap font; its glyphs are 136 x 128.
GLYPH_WIDTH = 136
TOP = 4  # Centers 128 pixel rows in a square of 136.
FULL_FACE = "\U0001f600"


@dataclasses.dataclass(frozen=True)
class Glyph:
    """A sequence of code points, its cleaned name, and whether it is the flag of a country or region."""

    sequence: str
    name: str
    is_flag: bool


def list_glyphs() -> Iterator[Glyph]:
    """Fully qualified sequences without skin tones, in the order of the `emoji` package."""
    try:
        import emoji
    except ImportError as error:
        raise UserError("This script needs the package emoji: pip install emoji.") from error
    for sequence, entry in emoji.EMOJI_DATA.items():
        has_skin_tone = any(0x1F3FB <= ord(character) <= 0x1F3FF for character in sequence)
        if entry["status"] == emoji.STATUS["fully_qualified"] and not has_skin_tone:
            # Regional indicators spell countries; tags spell England, Scotland and Wales.
            is_flag = 0x1F1E6 <= ord(sequence[0]) <= 0x1F1FF or sequence[-1] == "\U000e007f"
            yield Glyph(sequence, names.clean_name(entry["en"], is_flag), is_flag)


def load_font(path: epath.PathLike) -> ImageFont.FreeTypeFont:
    """Opens the font with the layout engine that supports joined sequences.

    Raises:
        UserError: the font cannot be opened, or Pillow lacks raqm.
    """
    if not features.check("raqm"):
        raise UserError(
            "Pillow was built without raqm and cannot render joined emoji: install its wheel."
        )
    try:
        return ImageFont.truetype(str(path), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened as a font of size {FONT_SIZE} ({error})."
        ) from error


def render_glyph(font: ImageFont.FreeTypeFont, sequence: str) -> Image.Image | None:
    """Renders one RGBA cell; None if the font has no glyph for it or falls back to several glyphs."""
    if font.getlength(sequence) != font.getlength(FULL_FACE):
        return None
    image = Image.new("RGBA", (GLYPH_WIDTH, GLYPH_WIDTH))
    ImageDraw.Draw(image).text((0, TOP), sequence, font=font, embedded_color=True)
    if image.getbbox() is None:
        return None
    return image.resize((CELL, CELL), Image.Resampling.LANCZOS)


def encode_sheet(cells: Sequence[Image.Image]) -> bytes:
    """Arranges cells row by row and encodes them as one WebP image."""
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(cells) // COLUMNS) * CELL))
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=QUALITY, method=6)
    return buffer.getvalue()


def write_sheet(font_path: epath.PathLike, out: epath.PathLike) -> None:
    """Renders everything and writes `sheet.webp` and `index.json` into the folder `out`."""
    font = load_font(font_path)
    drawn = [(glyph, render_glyph(font, glyph.sequence)) for glyph in list_glyphs()]
    glyphs = [glyph for glyph, cell in drawn if cell is not None]
    sheet = encode_sheet([cell for _, cell in drawn if cell is not None])
    # Classes are merged from the compressed cells, the ones that everything else uses.
    cells = art.draw_cells(art.read_cells(sheet, CELL, range(len(glyphs))), classes.SMALLEST_SIZE)
    merged = classes.merge_glyphs([glyph.name for glyph in glyphs], art.lay_on(cells, art.WHITE))
    index = {
        "cell": CELL,
        "font": {
            "name": " ".join(filter(None, font.getname())),
            "sha256": files.file_digest(font_path),
        },
        "license": "OFL-1.1",
        "glyphs": [
            {"sequence": _spell(glyph.sequence), "name": glyph.name, "flag": glyph.is_flag}
            for glyph in glyphs
        ],
        "classes": [{"glyph": entry.glyph, "names": list(entry.names)} for entry in merged],
    }
    files.write_atomic(epath.Path(out) / art.SHEET_FILE, sheet)
    text = (
        files.canonical_json(index).replace("},{", "},\n{") + "\n"
    )  # One entry per line, for diffs.
    files.write_atomic(epath.Path(out) / art.INDEX_FILE, text.encode())


def _spell(sequence: str) -> str:
    return " ".join(f"{ord(character):04X}" for character in sequence)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description="Render the emoji sheet and its index.")
    parser.add_argument("--font", required=True, help="NotoColorEmoji.ttf, the bitmap version")
    parser.add_argument("--out", required=True, help="folder for sheet.webp and index.json")
    arguments = parser.parse_args(argv)
    try:
        write_sheet(arguments.font, arguments.out)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
