"""The page claims only what its figures bear."""

import pytest

from rag_mm.report import summary, verdicts
from rag_mm.report.figures import Figure


def accuracy(share, ci95=0.02):
    return {"accuracy": share, "ci95": ci95, "n": 256}


def mean(value, ci95=0.1):
    return {"mean": value, "ci95": ci95, "n": 256}


def metrics(
    joint=0.6, vanilla=0.02, hit=0.02, random=0.02, removed=0.02, ceiling=0.94, art=(5.4, 0.6, 0.5),
    seen_moves=0.004, cider_vanilla=1.9,
):  # fmt: skip
    return {
        "tokenizer": {"scorer_ceiling": {"joint": accuracy(ceiling)}, "psnr": 24.1},
        "retriever": {"same_class_at_2": accuracy(0.95)},
        "decoder": {
            "joint_accuracy": {"docs0": accuracy(0.02), "docs2": accuracy(joint)},
            "art_nll": {f"docs{k}": mean(nll) for k, nll in enumerate(art)},
            "cider": {"docs0": mean(2.0), "docs2": mean(5.0)},
            "paired": {"joint_held_out_removed_minus_docs0": mean(removed - 0.02, 0.02)},
            "seen": {"paired": {"joint_docs2_minus_held_out_removed": mean(seen_moves, 0.01)}},
        },
        "control": {"joint_accuracy": accuracy(vanilla), "cider": mean(cider_vanilla)},
        "baselines": {
            "hit_itself": {"joint_accuracy": accuracy(hit)},
            "random_documents": {"joint_accuracy": accuracy(random)},
            "held_out_removed": {"joint_accuracy": accuracy(removed)},
        },
    }


def status(figures):
    return {verdict.claim: verdict.status for verdict in verdicts.verdicts(figures)}


def test_a_good_run_shows_every_claim():
    assert set(status(metrics()).values()) == {"yes"}
    assert "60.0 % ± 2.0" in verdicts.headline(metrics()).sentence
    assert len(status(metrics())) == 12


def test_a_gain_within_two_standard_errors_is_no_gain():
    # Standard error of the difference: sqrt(2) * 0.02 / 1.96 = 0.0144.
    assert verdicts.headline(metrics(joint=0.30, vanilla=0.27)).status == "yes"
    small = verdicts.headline(metrics(joint=0.29, vanilla=0.27))
    assert small.status == "no"
    assert small.sentence.startswith("Retrieval does not help yet")


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("The codes keep the facts", {"ceiling": 0.7}),
        ("A document is read", {"art": (5.4, 5.39, 5.3)}),
        ("Two documents are no worse than one", {"art": (5.4, 0.6, 0.9)}),
        ("Retrieval helps", {"vanilla": 0.6}),
        ("It is the content of the documents that helps", {"random": 0.6}),
        ("It composes rather than hands back", {"hit": 0.6}),
        ("It reaches half of what is possible", {"joint": 0.46}),
        ("What the memory lacks is not drawn", {"removed": 0.10}),
        ("Other entities stay as they were", {"seen_moves": -0.03}),
        ("Captions profit from documents", {"cider_vanilla": 5.0}),
    ],
)
def test_each_failure_turns_its_claim(claim, change):
    found = status(metrics(**change))
    assert found.pop(claim) == "no"
    assert set(found.values()) == {"yes"}


def test_without_a_skill_the_rows_bring_nothing_back():
    """Removing rows from a model that cannot draw harms nothing, and so adding them shows nothing."""
    found = status(metrics(joint=0.02))
    assert found["What the memory lacks is not drawn"] == "yes"
    assert found["Rows added to the memory bring it back"] == "no"


def test_one_claim_of_two_that_fails_is_enough():
    """Captions must beat both no documents and the vanilla model; one comparison may be missing."""
    figures = metrics()
    del figures["control"]["cider"]
    assert status(figures)["Captions profit from documents"] == "unknown"
    figures["decoder"]["cider"]["docs2"] = mean(1.0)
    assert status(figures)["Captions profit from documents"] == "no"


def test_nothing_measured_nothing_claimed():
    assert set(status({}).values()) == {"unknown"}
    assert verdicts.headline({}).status == "unknown"
    assert verdicts.exceeds(Figure(0.9), Figure(0.1)) is None  # No interval, no claim.


def test_the_summary_has_ten_rows_and_invents_nothing():
    rows = summary.summary_table({})
    assert len(rows) == 10 and {value for _, value, _ in rows} == {"not measured"}


def test_the_summary_quotes_accuracies_beside_the_ceiling():
    rows = {label: (value, meaning) for label, value, meaning in summary.summary_table(metrics())}
    assert rows["Tokenizer, PSNR"][0] == "24.1 dB"
    value, meaning = rows["Joint accuracy"]
    assert value == "0 docs: 2.0 % ± 2.0 · 1 doc: not measured · 2 docs: 60.0 % ± 2.0"
    assert "the ceiling is 94.0 % ± 2.0" in meaning
    assert "rows removed: 2.0 % ± 2.0" in rows["Joint accuracy without us"][0]


def test_the_summary_tells_what_retrieval_costs_where_it_was_measured():
    costs = {"wall_seconds": 1180.0, "peak_rss_gib": 3.12}
    rows = {label: value for label, value, _ in summary.summary_table({"quickstart": costs})}
    assert rows["Time and memory"] == "19 min 40 s · 3.1 GiB"
    costs["retrieval_share"] = 0.0197
    rows = {label: value for label, value, _ in summary.summary_table({"quickstart": costs})}
    assert rows["Time and memory"] == "19 min 40 s · 3.1 GiB · retrieval 2.0 %"


def test_a_difference_paired_by_document_decides_where_it_was_measured():
    """Documents differ more from each other than a document changes: pairing sees what intervals hide."""
    wide = {"docs0": mean(2.84, 0.11), "docs1": mean(2.73, 0.11)}
    paired = {"art_nll_docs1_minus_docs0": mean(-0.105, 0.009)}

    def read(decoder):
        found = verdicts.verdicts({"decoder": decoder})
        return next(verdict.status for verdict in found if verdict.claim == "A document is read")

    assert read({"art_nll": wide}) == "no"
    assert read({"art_nll": wide, "paired": paired}) == "yes"
    swapped = {"docs0": wide["docs1"], "docs1": wide["docs0"]}
    assert read({"art_nll": swapped, "paired": paired}) == "no"
