"""The page claims only what its figures bear."""

import pytest

from rag_mm.report import summary, verdicts
from rag_mm.report.measured import Measured


def accuracy(share, ci95=0.02):
    return {"accuracy": share, "ci95": ci95, "n": 256}


def mean(value, ci95=0.1):
    return {"mean": value, "ci95": ci95, "n": 256}


def metrics(joint=0.6, vanilla=0.02, hit=0.02, random=0.02, ceiling=0.94, art=(5.4, 0.6)):
    return {
        "tokenizer": {"scorer_ceiling": {"joint": accuracy(ceiling)}, "psnr": 24.1},
        "retriever": {"same_class_at_2": accuracy(0.95)},
        "decoder": {
            "joint_accuracy": {"docs0": accuracy(0.02), "docs2": accuracy(joint)},
            "art_nll": {"docs0": mean(art[0]), "docs1": mean(art[1])},
            "cider": {"docs0": mean(2.0), "docs2": mean(5.0)},
        },
        "control": {"joint_accuracy": accuracy(vanilla)},
        "baselines": {
            "hit_itself": {"joint_accuracy": accuracy(hit)},
            "random_documents": {"joint_accuracy": accuracy(random)},
        },
    }


def status(figures):
    return {verdict.claim: verdict.status for verdict in verdicts.verdicts(figures)}


def test_a_good_run_shows_every_claim():
    assert set(status(metrics()).values()) == {"yes"}
    assert "60.0 % ± 2.0" in verdicts.headline(metrics()).sentence


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
        ("A document is read", {"art": (5.4, 5.39)}),
        ("Retrieval helps", {"vanilla": 0.6}),
        ("It is the content of the documents that helps", {"random": 0.6}),
        ("It composes rather than hands back", {"hit": 0.6}),
        ("It reaches half of what is possible", {"joint": 0.46}),
    ],
)
def test_each_failure_turns_its_claim(claim, change):
    found = status(metrics(**change))
    assert found.pop(claim) == "no"
    assert set(found.values()) == {"yes"}


def test_nothing_measured_nothing_claimed():
    assert set(status({}).values()) == {"unknown"}
    assert verdicts.headline({}).status == "unknown"
    assert verdicts.exceeds(Measured(0.9), Measured(0.1)) is None  # No interval, no claim.


def test_the_summary_has_ten_rows_and_invents_nothing():
    rows = summary.summary_table({})
    assert len(rows) == 10 and {value for _, value, _ in rows} == {"not measured"}


def test_the_summary_quotes_accuracies_beside_the_ceiling():
    rows = {label: (value, meaning) for label, value, meaning in summary.summary_table(metrics())}
    assert rows["Tokenizer, PSNR"][0] == "24.1 dB"
    value, meaning = rows["Joint accuracy"]
    assert value == "0 docs: 2.0 % ± 2.0 · 1 doc: not measured · 2 docs: 60.0 % ± 2.0"
    assert "the ceiling is 94.0 % ± 2.0" in meaning


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
