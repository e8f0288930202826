"""The page of an Emu: claims by their bounds, figures by documents, pictures and texts that are escaped."""

import copy

import numpy as np

from rag_mm.report import emu_page, emu_verdicts


def _share(value, ci95=0.02):
    return {"accuracy": value, "ci95": ci95, "n": 192}


def _mean(value, ci95=0.02):
    return {"mean": value, "ci95": ci95, "n": 192}


def _paired(mean, error=0.01):
    return {"mean": mean, "standard_error": error, "ci95": 2 * error, "n": 192}


GOOD = {
    "emu": {"train": {"text_ce": 0.4}},
    "emu_figures": {
        "codes": {"participation_ratio": 8.0, "variance_to_initial": 1.2},
        "held_out": {
            "r2": {"none": _mean(0.6), "oracle": _mean(0.78)},
            "random": {"none": _share(0.7), "shuffled": _share(0.03)},
            "own": {"none": _share(0.99)},
            "same": {
                "none": _share(0.09),
                "oracle": _share(0.92),
                "wrong": _share(0.03),
                "retrieved": _share(0.7),
            },
            "read_entity": {"encoded": _share(0.6)},
            "read_place": {"encoded": _share(1.0)},
            "read_color": {"encoded": _share(1.0)},
            "place": {"oracle": _share(0.98)},
            "color": {"oracle": _share(0.97)},
            "paired": {"same_oracle_minus_none": _paired(0.83)},
        },
        "nll_to_text_alone": {"seen": {"none": _mean(1.04)}},
        "seen": {"exact": {"none": _share(0.48), "oracle": _share(0.93)}},
        "held_out_clips": {
            "direction": {"in_order": _share(0.9), "shuffled_frames": _share(0.3)},
            "paired": {"direction_in_order_minus_shuffled_frames": _paired(0.6)},
        },
    },
}


def _statuses(metrics):
    return [claim.status for claim in emu_verdicts.claims(metrics)]


def test_all_claims_hold_for_good_figures_and_none_is_judged_without():
    assert set(_statuses(GOOD)) == {"yes"}
    assert set(_statuses({})) == {"unknown"}


def test_each_figure_can_break_its_claim():
    changes = {
        ("emu", "train", "text_ce"): 0.61,
        ("emu_figures", "codes", "participation_ratio"): 4.9,
        ("emu_figures", "codes", "variance_to_initial"): 0.09,
        ("emu_figures", "held_out", "r2", "oracle"): _mean(0.69),
        ("emu_figures", "held_out", "read_place", "encoded"): _share(0.94),
        ("emu_figures", "held_out", "random", "shuffled"): _share(0.09),
        ("emu_figures", "held_out", "same", "wrong"): _share(0.5),
        ("emu_figures", "held_out", "same", "none"): _share(0.21),
        ("emu_figures", "held_out", "paired", "same_oracle_minus_none"): _paired(0.8, 0.5),
        ("emu_figures", "nll_to_text_alone", "seen", "none"): _mean(1.11),
        ("emu_figures", "seen", "exact", "none"): _share(0.34),
        ("emu_figures", "held_out", "color", "oracle"): _share(0.89),
        ("emu_figures", "held_out_clips", "direction", "in_order"): _share(0.26),
    }
    for path, value in changes.items():
        metrics = copy.deepcopy(GOOD)
        node = metrics
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        assert _statuses(metrics).count("no") == 1, path


def test_the_table_has_what_was_measured_by_documents():
    counts = {"random": 32, "own": 32, "same": 7}
    table = emu_page.figure_table(
        "Held-out", GOOD["emu_figures"]["held_out"] | {"candidates": counts}
    )
    assert list(table.head) == [
        "no document",
        "document of its class",
        "retrieved document",
        "document of another class",
        "another's caption",
        "the image's own codes",
    ]
    same = next(row for row in table.rows if row[0] == "right of 7 of one place and color")
    assert same[1:] == ["9.0 % ± 2.0", "92.0 % ± 2.0", "70.0 % ± 2.0", "3.0 % ± 2.0", "", ""]


def test_shares_among_another_number_of_images_judge_no_claim():
    metrics = copy.deepcopy(GOOD)
    counts = metrics["emu_figures"]["held_out"]["candidates"] = {"random": 16, "same": 32}
    assert _statuses(metrics).count("unknown") == 1
    assert "The images of 16 test scenes" in emu_page.render("Emu", "lead", metrics, [], [], [])
    counts |= {"random": 32, "same": 7}
    assert _statuses(metrics).count("unknown") == 1


def test_the_page_frames_the_right_picture_and_escapes_captions():
    image = np.zeros((4, 4, 3), np.uint8)
    found = emu_page.Found(
        "<b>apple", {"none": (np.stack([image] * 3), 1), "oracle": (image[None], -1)}
    )
    written = emu_page.Written(image, "dog", {"none": "a <i>dog"})
    html = emu_page.render("Emu", "lead", GOOD, [found], [written], [])
    assert "&lt;b&gt;apple" in html and "a &lt;i&gt;dog" in html and "<i>dog" not in html
    assert html.count("<img") == 5 and html.count('class="right"') == 1
    assert "<script" not in html
