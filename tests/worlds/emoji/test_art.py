"""What a class of glyphs is, and what the shipped sheet holds."""

import json
import pathlib

import numpy as np
import pytest
from PIL import features

from rag_mm.core.errors import UserError
from rag_mm.worlds.emoji import art, classes, names, render

FOLDER = pathlib.Path(art.__file__).parent
FONT = pathlib.Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


@pytest.fixture(scope="module")
def index():
    return json.loads((FOLDER / art.INDEX_FILE).read_text())


@pytest.fixture(scope="module")
def cells(index):
    sheet = (FOLDER / art.SHEET_FILE).read_bytes()
    return art.read_cells(sheet, index["cell"], range(len(index["glyphs"])))


@pytest.mark.parametrize(
    ("short_name", "is_flag", "expected"),
    [
        (":grinning_face:", False, "grinning face"),
        (":Côte_d’Ivoire:", True, "flag of cote d'ivoire"),
        (":Trinidad_&_Tobago:", True, "flag of trinidad and tobago"),
        (":AB_button_(blood_type):", False, "ab button blood type"),
    ],
)
def test_names_are_cleaned(short_name, is_flag, expected):
    assert names.clean_name(short_name, is_flag) == expected


def test_variants_of_one_drawing_share_a_base_name():
    running = ("man running", "person running", "woman running facing right")
    assert {names.base_name(name) for name in running} == {"running"}
    assert names.base_name("one-thirty") == names.base_name("two o'clock") == "clock"
    assert names.base_name("old woman") == names.base_name("boy") == "person"
    assert names.base_name("red apple") == "red apple"


def test_merging_keeps_near_equals_together_and_unrelated_names_out():
    cards = np.full((6, 16, 16, 3), 255, np.uint8)
    cards[:4] = 100
    cards[1] += 10  # 0.04 away: a variant of 0, and near to 2 without being akin to it.
    cards[2] += 5  # 0.02 away from 0: the same art.
    cards[3] += 90
    cards[5, :1] = 250  # As good as blank.
    glyph_names = ["runner", "woman runner", "red runner", "apple", "cloud", "white square"]
    assert classes.merge_glyphs(glyph_names, cards) == (
        classes.GlyphClass(0, ("runner", "red runner", "woman runner")),
        classes.GlyphClass(3, ("apple",)),
    )
    glyph_names[1] = "blue swan"
    assert classes.merge_glyphs(glyph_names, cards)[0].names == ("runner", "red runner")


def test_the_index_holds_the_classes_of_the_sheet(index, cells):
    assert len(cells) == 1899
    cards = art.lay_on(art.draw_cells(cells, classes.SMALLEST_SIZE), art.WHITE)
    merged = classes.merge_glyphs([glyph["name"] for glyph in index["glyphs"]], cards)
    kept = [{"glyph": entry.glyph, "names": list(entry.names)} for entry in merged]
    assert kept == index["classes"]
    assert len(kept) == 1760


def test_any_two_classes_can_be_told_apart_and_none_from_an_empty_card():
    cards = art.load_art().cards(classes.SMALLEST_SIZE).reshape(1760, -1).astype(np.float64) / 255
    norms = (cards**2).sum(1)
    squared = norms[:, None] + norms - 2 * cards @ cards.T
    np.fill_diagonal(squared, np.inf)
    assert np.sqrt(squared.min() / cards.shape[1]) > classes.DISTINCT_RMS - 1e-6
    assert np.sqrt(((1 - cards) ** 2).mean(1)).min() >= classes.DISTINCT_RMS


def test_names_are_plain_and_belong_to_one_class():
    pictures = art.load_art()
    every = [name for its_names in pictures.names for name in its_names]
    assert len(every) == len(set(every))
    assert all(name.isascii() and name == name.lower().strip() for name in every)
    assert not any(character in name for name in every for character in ":_()&")
    assert next(its_names[:2] for its_names in pictures.names if "flag of norway" in its_names) == (
        "flag of norway",
        "flag of bouvet island",
    )
    assert pictures.is_flag.sum() == 240


def test_art_is_drawn_on_white_at_any_size():
    pictures = art.load_art()
    for size in (16, 24):
        rgba, card = pictures.rgba(5, size), pictures.card(5, size)
        assert rgba.shape == (size, size, 4) and card.shape == (size, size, 3)
        alpha = rgba[..., 3:] / 255
        np.testing.assert_allclose(card, rgba[..., :3] * alpha + 255 * (1 - alpha), atol=0.5001)


def test_resizing_lets_no_color_leak_out_of_clear_pixels():
    cell = np.zeros((1, 64, 64, 4), np.uint8)
    cell[..., 0] = 255  # Clear red around an opaque blue square.
    cell[0, 16:48, 16:48] = (0, 0, 255, 255)
    small = art.draw_cells(cell, 16)[0]
    seen = small[small[..., 3] > 0]
    assert len(seen) and (seen[:, 0] == 0).all() and (seen[:, 2] == 255).all()


def test_a_missing_font_is_one_clear_sentence(tmp_path, capsys):
    with pytest.raises(UserError, match="none.ttf cannot be opened"):
        render.load_font(tmp_path / "none.ttf")
    with pytest.raises(SystemExit) as stop:
        render.main([f"--font={tmp_path / 'none.ttf'}", f"--out={tmp_path / 'out'}"])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    assert "cannot be opened" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not FONT.exists(), reason="the font package fonts-noto-color-emoji is absent")
@pytest.mark.skipif(not features.check("raqm"), reason="this Pillow has no raqm")
def test_the_sheet_is_what_the_font_draws(index, cells):
    font = render.load_font(FONT)
    for i in range(0, len(cells), 19):
        code_points = index["glyphs"][i]["sequence"].split()
        drawn = render.render_glyph(font, "".join(chr(int(point, 16)) for point in code_points))
        fresh = np.asarray(drawn)
        np.testing.assert_array_equal(cells[i, ..., 3], fresh[..., 3])
        # WebP halves the resolution of color; little of that is left at the drawn sizes.
        shown, wanted = art.lay_on(art.draw_cells(np.stack([cells[i], fresh]), 24), art.WHITE)
        assert classes.rms_to(shown[None], wanted)[0] < 0.04
    ballet_dancer = "\U0001f9d1\u200d\U0001fa70"
    assert render.render_glyph(font, ballet_dancer) is None  # Would fall apart into two glyphs.
