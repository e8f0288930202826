"""The page is one file without network access or scripts, whatever the captions contain."""

import base64
import dataclasses
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from rag_mm import report
from rag_mm.report import content, curves, page, sheets

HOSTILE = "<script>alert(1)</script> \"double\" 'single' & <img src=x onerror=alert(1)> $x^2$"


def picture(seed, size=32):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def sample(text="a rocket", **changes):
    facts = {"entity": False, "place": True, "color": False, "joint": False}
    row = report.Generation(
        text, picture(3), [picture(4)], {"docs2": picture(5), text: picture(6)}, {"docs2": facts}
    )
    parts = {
        "title": f"Title {text}",
        "command": f"rag-mm quickstart {text}",
        "seed": 7,
        "version": "0.1.0",
        "metrics": {"memory": {"rows": 10, text: 1.5}},
        "config": {"name": text},
        "setting": [(text, text)],
        "notes": [text],
        "machine": text,
        "stage_seconds": {text: 61.0, "decoder": 5.0},
        "reconstructions": [report.Reconstruction(text, picture(0), picture(1))],
        "retrievals": [report.Retrieval(text, [report.Hit(text, picture(2), 0.871)])],
        "story": [row],
        "choice": f"Selected at random: {text}",
        "generations": [row],
        "captions": [report.CaptionExample(picture(7), text, {"docs2": text, "control": ""})],
        "curves": [report.Curve(text, text, [0, 1, 2], [3.0, 2.0, 1.0])],
        "band_note": text,
    }
    return report.ReportData(**(parts | changes))


class Tags(html.parser.HTMLParser):
    """Collects start tags with their attributes, and the text between them."""

    def __init__(self):
        super().__init__()
        self.tags, self.text, self.open = [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def parse(data):
    parser = Tags()
    parser.feed(report.render_report(data))
    assert not parser.open
    return parser


def test_hostile_captions_are_shown_verbatim_and_stay_inert():
    tags = parse(sample(HOSTILE))
    assert not {tag for tag, _ in tags.tags} & {"script", "iframe", "object", "link", "base"}
    for tag, attributes in tags.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    images = [attributes for tag, attributes in tags.tags if tag == "img"]
    assert len(images) == 2 + 2 + 1 + 4 + 1
    assert all(image["src"].startswith("data:image/png;base64,") for image in images)
    assert tags.text.count(HOSTILE) >= 15  # Every panel, the config and the chart show it.


def test_nothing_is_fetched():
    tags = parse(sample())
    for tag, attributes in tags.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            if name in attributes:
                assert attributes[name].startswith(("#", "data:")), (tag, attributes)
    html_text = report.render_report(sample())
    assert not re.search(r"url\((?!#)|@import", html_text)
    policy = [a["content"] for tag, a in tags.tags if a.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_ids_are_unique():
    band = content.Band([0, 1], [0.9, 0.4], [1.1, 0.6], [1.0, 0.5])
    two = [
        report.Curve(name, label, [0, 1], [1.0, 0.5], band)
        for name in ("tokenizer", "decoder")
        for label in ("one", "other")
    ]
    ids = [a["id"] for _, a in parse(sample(curves=two)).tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_same_data_gives_the_same_page():
    assert report.render_report(sample()) == report.render_report(sample())


def test_images_are_lossless_at_an_integer_zoom():
    tag = page.image_tag(picture(0), 'a "quoted" picture')
    assert 'width="96" height="96"' in tag and "a &#34;quoted&#34; picture" in tag
    content = base64.b64decode(re.search(r"base64,([^\"]+)", tag)[1])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), picture(0))
    assert 'width="64"' in page.image_tag(picture(0, 64), "")
    assert 'width="96"' in page.image_tag(picture(0, 256), "")
    with pytest.raises(ValueError, match="float32"):
        page.image_tag(picture(0).astype(np.float32), "")


def test_the_scorers_verdict_is_below_each_image():
    text = report.render_report(sample())
    assert "wrong: entity, color" in text
    assert "0.87" in text and "(empty)" in text


def test_an_empty_run_says_what_is_missing():
    empty = dict.fromkeys(
        ("story", "reconstructions", "retrievals", "generations", "captions", "curves", "setting",
         "notes"),
        (),
    )  # fmt: skip
    text = parse(sample(metrics={}, stage_seconds={}, **empty)).text
    parts = ("Generated images", "Accuracies", "Reconstructions", "Retrieval", "Captions")
    for part in ("Images of held-out entities", *parts):
        assert f"{part}: not measured in this run." in text
    assert "measured without a confidence interval" in text


def test_a_surrogate_in_a_caption_does_not_stop_the_page():
    assert "bad ? byte" in report.render_report(sample("bad \udcff byte", curves=()))


def test_the_fact_table_omits_what_was_not_measured():
    figure = {"accuracy": 0.5, "ci95": 0.1, "n": 100}
    metrics = {
        "decoder": {
            "joint_accuracy": {"docs2": figure},
            "kernel_distance": {"docs2": {"polynomial": 2.5, "gaussian": 1.0, "n": 100}},
        },
        "control": {"joint_accuracy": figure},
    }
    rows = page.fact_table(metrics)
    assert [name for name, _, _ in rows] == ["2 documents", "baseline"]
    _, cells, kernel = rows[0]
    assert cells[0] == ("not measured", None) and cells[3] == ("50.0 % ± 10.0", 50.0)
    assert kernel == "2.50" and rows[1][2] == "not measured"


def test_long_curves_are_thinned_and_unequal_ones_refused():
    long = report.Curve("loss", "train", np.arange(50_000), np.linspace(5, 1, 50_000))
    assert len(curves.chart_svg("loss", [long])) < 40_000
    with pytest.raises(ValueError, match="2 steps, 1 values"):
        curves.chart_svg("loss", [report.Curve("loss", "train", [0, 1], [1.0])])


def test_the_overview_compares_retrieval_with_the_baseline():
    right = dict.fromkeys(("entity", "place", "color", "joint"), True)
    drawn = {key: picture(i) for i, key in enumerate(("docs0", "docs2", "docs10", "control"))}
    row = report.Generation("flag of aruba", picture(7), [picture(8)], drawn, {"docs10": right})
    assert row.compared() == [("with retrieval", "docs10"), ("baseline", "control")]
    text = report.render_report(sample(story=[row], choice="Selected by a rule."))
    first_screen = text[: text.index("<nav>")]
    for phrase in ("flag of aruba", "✓ correct", "Selected by a rule."):
        assert phrase in first_screen
    assert first_screen.index("flag of aruba") < first_screen.index("Selected by a rule.")
    alone = report.Generation("flag", picture(1), [], {"docs1": picture(2)})
    assert alone.compared() == [("with retrieval", "docs1")]


def test_verdicts_name_the_wrong_facts():
    facts = dict.fromkeys(("entity", "place", "color", "joint"), False)
    assert content.fact_verdict(facts) == "✗ all wrong"
    assert content.fact_verdict(facts | {"place": True}) == "✗ wrong: entity, color"
    assert content.fact_verdict(dict.fromkeys(facts, True)) == "✓ correct"


def test_the_story_sheet_enlarges_by_an_integer_factor():
    """832 pixels, a README's column; each pixel of a 32-pixel image becomes 3 x 3."""
    row = report.Generation(
        "closed mailbox with raised flag at the bottom left on a yellow background, by day",
        picture(0), [picture(1), picture(2)], {"docs2": picture(3), "control": picture(4)},
    )  # fmt: skip
    sheet = np.asarray(sheets.story_sheet([row, row, row]))
    assert sheet.shape[1] == 832
    for seed in (1, 2, 3, 4):
        large = np.kron(picture(seed), np.ones((3, 3, 1), np.uint8))
        rows, columns = np.where((sheet[:-95, :-95] == large[0, 0]).all(axis=-1))
        found = [
            np.array_equal(sheet[r : r + 96, c : c + 96], large)
            for r, c in zip(rows, columns, strict=True)
        ]
        assert sum(found) == 3


def test_a_band_is_drawn_behind_its_line():
    line = report.Curve("loss", "train", [0, 1], [2.0, 1.0])
    band = content.Band([0, 1], [1.5, 0.5], [2.5, 1.5], [2.0, 1.0])
    bare = curves.chart_svg("loss", [line])
    banded = curves.chart_svg("loss", [dataclasses.replace(line, band=band)])
    assert "fill-opacity" in banded and "fill-opacity" not in bare


def test_speed_is_reported_if_it_was_measured():
    speed = {"retrieval_ms": 0.83, "generation_ms": 41.2, "retrieval_share": 0.0197}
    text = parse(sample(metrics={"quickstart": speed})).text
    assert "0.83 ms" in text and "41.2 ms" in text
    assert "2.0\N{NO-BREAK SPACE}% of the total" in text
    assert "of the total" not in parse(sample()).text


def test_panels_are_written_as_png(tmp_path):
    line = [report.Curve("loss", "train", [0, 1], [2.0, 1.0])]
    data = sample("Côte d’Ivoire\n" + 50 * HOSTILE, curves=line)
    paths = report.save_figures(data, tmp_path / "figures")
    assert [path.name for path in paths] == [
        "story.png", "reconstructions.png", "retrieval.png", "generated.png", "captions.png", "curves.png",
    ]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(
        path.name for path in paths
    )
    for path in paths:
        with Image.open(str(path)) as opened:
            opened.load()
            assert opened.format == "PNG" and opened.width < 2000
    parts = ("story", "reconstructions", "retrievals", "generations", "captions", "curves")
    empty = sample(**dict.fromkeys(parts, ()))
    assert report.save_figures(empty, tmp_path / "none") == []
