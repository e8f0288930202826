"""The page claims only what its metrics support."""

import pytest

from rag_mm.report import summary, verdicts
from rag_mm.report.figures import Figure


def accuracy(share, ci95=0.02):
    return {"accuracy": share, "ci95": ci95, "n": 256}


def mean(value, ci95=0.1):
    return {"mean": value, "ci95": ci95, "n": 256}


def metrics(
    joint=0.6, baseline=0.02, hit=0.02, random=0.02, removed=0.02, ceiling=0.94, art=(5.4, 0.6, 0.5),
    seen_moves=0.004, cider_baseline=1.9, copied=(0.01, 0.0, 0.0),
):  # fmt: skip
    return {
        "tokenizer": {"scorer_ceiling": {"joint": accuracy(ceiling)}, "psnr": 24.1},
        "retriever": {"same_class_at_2": accuracy(0.95)},
        "decoder": {
            "joint_accuracy": {"docs0": accuracy(0.02), "docs2": accuracy(joint)},
            "art_nll": {f"docs{k}": mean(nll) for k, nll in enumerate(art)},
            "cider": {"docs0": mean(2.0), "docs2": mean(5.0)},
            **{
                f"copied_{name}": {"docs2": accuracy(share)}
                for name, share in zip(("place", "color", "whole"), copied, strict=True)
            },
            "paired": {"joint_held_out_removed_minus_docs0": mean(removed - 0.02, 0.02)},
            "seen": {"paired": {"joint_docs2_minus_held_out_removed": mean(seen_moves, 0.01)}},
        },
        "control": {"joint_accuracy": accuracy(baseline), "cider": mean(cider_baseline)},
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
    assert len(status(metrics())) == 13


def test_a_gain_within_two_standard_errors_is_no_gain():
    # Standard error of the difference: sqrt(2) * 0.02 / 1.96 = 0.0144.
    assert verdicts.headline(metrics(joint=0.30, baseline=0.27)).status == "yes"
    small = verdicts.headline(metrics(joint=0.29, baseline=0.27))
    assert small.status == "no"
    assert small.sentence.startswith("Retrieval does not help yet")


@pytest.mark.parametrize(
    ("claim", "change"),
    [
        ("The tokenizer preserves the facts", {"ceiling": 0.7}),
        ("The decoder uses a document", {"art": (5.4, 5.39, 5.3)}),
        ("Two documents are no worse than one", {"art": (5.4, 0.6, 0.9)}),
        ("Retrieval helps", {"baseline": 0.6}),
        ("The content of the documents matters", {"random": 0.6}),
        ("The decoder does better than returning the top hit", {"hit": 0.6}),
        ("Joint accuracy reaches half of the ceiling", {"joint": 0.46}),
        ("Images follow the caption where documents differ", {"copied": (0.06, 0.0, 0.0)}),
        ("Images follow the caption where documents differ", {"copied": (0.0, 0.04, 0.0)}),
        ("Images follow the caption where documents differ", {"copied": (0.0, 0.0, 0.004)}),
        ("Removing an entity's documents removes the entity", {"removed": 0.10}),
        ("Seen entities are unaffected", {"seen_moves": -0.03}),
        ("Retrieval improves captions", {"cider_baseline": 5.0}),
    ],
)
def test_each_failure_flips_its_claim(claim, change):
    found = status(metrics(**change))
    assert found.pop(claim) == "no"
    assert set(found.values()) == {"yes"}


def test_an_untrained_model_gains_nothing_from_added_documents():
    """If the model cannot generate the entity at all, removing and adding documents changes nothing."""
    found = status(metrics(joint=0.02))
    assert found["Removing an entity's documents removes the entity"] == "yes"
    assert found["Adding documents adds entities without training"] == "no"


def test_one_claim_of_two_that_fails_is_enough():
    """Captions must beat both no documents and the baseline; one failed comparison decides."""
    figures = metrics()
    del figures["control"]["cider"]
    assert status(figures)["Retrieval improves captions"] == "unknown"
    figures["decoder"]["cider"]["docs2"] = mean(1.0)
    assert status(figures)["Retrieval improves captions"] == "no"


def test_nothing_measured_nothing_claimed():
    assert set(status({}).values()) == {"unknown"}
    assert verdicts.headline({}).status == "unknown"
    assert verdicts.exceeds(Figure(0.9), Figure(0.1)) is None  # No claim without an interval.


def test_the_summary_has_eleven_rows_and_invents_nothing():
    rows = summary.summary_table({})
    assert len(rows) == 11 and {value for _, value, _ in rows} == {"not measured"}


def test_the_summary_quotes_accuracies_with_the_ceiling():
    rows = {label: (value, meaning) for label, value, meaning in summary.summary_table(metrics())}
    assert rows["Tokenizer, PSNR"][0] == "24.1 dB"
    value, meaning = rows["Joint accuracy"]
    assert value == "0 docs: 2.0 % ± 2.0 · 1 doc: not measured · 2 docs: 60.0 % ± 2.0"
    assert "the ceiling is 94.0 % ± 2.0" in meaning
    assert "held-out removed: 2.0 % ± 2.0" in rows["Joint accuracy, baselines"][0]
    copied = rows["Copied against the caption"][0]
    assert copied == "place: 1.0 % ± 2.0 · color: 0.0 % ± 2.0 · whole: 0.0 % ± 2.0"


def test_the_summary_has_the_cost_of_retrieval_if_it_was_measured():
    costs = {"wall_seconds": 1180.0, "peak_rss_gib": 3.12}
    rows = {label: value for label, value, _ in summary.summary_table({"quickstart": costs})}
    assert rows["Time and memory"] == "19 min 40 s · 3.1 GiB"
    costs["retrieval_share"] = 0.0197
    rows = {label: value for label, value, _ in summary.summary_table({"quickstart": costs})}
    assert rows["Time and memory"] == "19 min 40 s · 3.1 GiB · retrieval 2.0 %"


def test_a_difference_paired_by_document_decides_where_it_was_measured():
    """The spread between documents hides the effect; pairing reveals it."""
    wide = {"docs0": mean(2.84, 0.11), "docs1": mean(2.73, 0.11)}
    paired = {"art_nll_docs1_minus_docs0": mean(-0.105, 0.009)}

    def read(decoder):
        found = verdicts.verdicts({"decoder": decoder})
        return next(
            verdict.status for verdict in found if verdict.claim == "The decoder uses a document"
        )

    assert read({"art_nll": wide}) == "no"
    assert read({"art_nll": wide, "paired": paired}) == "yes"
    swapped = {"docs0": wide["docs1"], "docs1": wide["docs0"]}
    assert read({"art_nll": swapped, "paired": paired}) == "no"
