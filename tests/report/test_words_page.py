"""The page of an autoencoder of words."""

import numpy as np

from rag_mm.report import words_page
from rag_mm.report.content import Curve
from rag_mm.report.word_figure import WordedImage, WordLevel

GRIDS = ((1, 1), (2, 2), (2, 2))


def _metrics(usage):
    level = {"psnr": 20.0, "words": 300, "code_usage": usage, "perplexity": 40.0}
    figures = {"relative_score_all_names": 0.75, "named": 0.3}
    return {f"level{n}": level for n in (1, 2, 3)} | {
        "words": {f"level{n}": figures for n in (1, 2, 3)}
    }


def _logged(norms=(1.0, 1.0, 1.0), errors=(0.9, 0.5, 0.1)):
    figures = {"norm": norms, "error": errors}
    return {
        f"latent_{name}_level{number}": value
        for name, values in figures.items()
        for number, value in enumerate(values, 1)
    }


def test_full_grids_that_use_few_words_are_marked():
    rows = words_page.level_table(_metrics(0.1), GRIDS, {}).rows
    assert [row[3] for row in rows] == ["10%", "low: 10%", "low: 10%"]
    healthy = words_page.level_table(_metrics(0.3), GRIDS, {}).rows
    assert [row[3] for row in healthy] == ["30%"] * 3
    assert rows[0] == ["1: 1 x 1", "20.0", "300", "10%", "40", "0.75", "30%"]


def test_latents_out_of_the_words_reach_are_marked():
    logged = _logged((0.02, 1.0, 3.0), (0.9, 0.5, 0.4))
    table = words_page.level_table(_metrics(0.3), GRIDS, logged)
    assert table.head[5:7] == ["latent norm", "latent error"]
    latents = [row[5:7] for row in table.rows]
    assert latents == [["low: 0.02", "0.90"], ["1.00", "0.50"], ["high: 3.00", "high: 0.40"]]
    del logged["latent_error_level2"]  # As of a value that is no finite number.
    assert words_page.level_table(_metrics(0.3), GRIDS, logged).rows[1][6] == "nan"


def test_there_is_a_column_for_each_kind_of_features():
    metrics = _metrics(0.3)
    metrics["words"]["level1"]["relative_score_seen_names"] = 0.5
    table = words_page.level_table(metrics, GRIDS, {})
    columns = ["relative score, all names", "relative score, seen names"]
    assert table.head[-3:] == [*columns, "any word in the image's name"]
    assert table.rows[0][-3:] == ["0.75", "0.50", "30%"]


def test_one_level_has_the_figures_of_all_codes():
    metrics = {"psnr": 24.0, "code_usage": 0.8, "perplexity": 94.0}
    assert words_page.level_table(metrics, ((8, 8),), {}).rows == [
        ["1: 8 x 8", "24.0", "", "80%", "94"]
    ]


def test_the_page_needs_nothing_else_and_escapes_captions():
    image = np.zeros((4, 4, 3), np.uint8)
    level = WordLevel((("cat",),), None, 1, image, 10.0)
    html = words_page.render(
        "SPAE",
        "A <b>lead</b>.",
        _metrics(0.1),
        GRIDS,
        _logged(),
        {"<script>alert(1)</script>": WordedImage(image, (level,))},
        [Curve("PSNR (dB)", "train", [1, 2], [10.0, 12.0])],
    )
    assert "<script" not in html and "&lt;script&gt;" in html and "&lt;b&gt;" in html
    assert 'src="data:image/png;base64,' in html and "http" not in html.replace(
        "http-equiv", ""
    ).replace("http://www.w3.org", "")
    assert "<svg" in html and 'class="off">low: 10%' in html and ">0.90<" in html
