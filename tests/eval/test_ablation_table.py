"""A table of variants x seeds: what its standard errors are over, when a claim counts, how it resumes."""

import json
import math

import numpy as np
import pytest

from rag_mm.core.errors import UserError
from rag_mm.eval import ablation_table, statistics

Q = 40


def cell(variant: str, seed: int) -> dict[str, np.ndarray]:
    """Documents differ a lot, variants and seeds a little: the case for pairing."""
    rng = np.random.default_rng((seed, len(variant)))
    difficulty = np.random.default_rng(seed).normal(5.0, 3.0, Q)
    gain = {"base": 0.0, "better": 0.5}[variant]
    return {
        "nll": difficulty - gain + rng.normal(0.0, 0.1, Q),
        "alone": difficulty + 1.0,
        "right": rng.random(Q) < 0.5,
    }


def key(variant: str, seed: int) -> str:
    return f"{variant} at {seed}"


def table(tmp_path, seeds=(0, 1, 2), measure=cell, **options) -> ablation_table.Table:
    return ablation_table.run(
        ["base", "better"], seeds, measure, tmp_path / "table", key, **options
    )


def test_a_difference_is_paired_by_document_and_its_error_is_over_seeds(tmp_path):
    made = table(tmp_path)
    found = ablation_table.compare(made, "nll", "better", "base")
    means = [np.mean(cell("better", s)["nll"] - cell("base", s)["nll"]) for s in (0, 1, 2)]
    assert found["seed_means"] == pytest.approx(means) and found["seeds"] == [0, 1, 2]
    assert found["mean"] == pytest.approx(np.mean(means))
    assert found["standard_error"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(3))
    assert (found["over"], found["n"], found["counts"]) == ("seeds", Q, True)
    # Student's t of two degrees of freedom.
    assert found["ci95"] == pytest.approx(4.30265273 * found["standard_error"])


def test_of_one_seed_the_error_is_over_documents_and_no_claim_counts(tmp_path):
    found = ablation_table.compare(table(tmp_path, seeds=[1]), "nll", "better", "base")
    ours, theirs = (cell(name, 1)["nll"] for name in ("better", "base"))
    wanted = statistics.paired_difference(ours, theirs)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    assert found["over"] == "documents" and found["counts"] is False


@pytest.mark.parametrize(
    ("means", "counts"),
    [
        ([0.5, 0.5, 0.6], True),
        ([-0.5, -0.5, -0.6], True),
        ([0.5, 0.6], False),  # two seeds are too few
        ([0.1, 0.5, 0.9], True),
        ([0.01, 0.2, 0.9], False),  # less than two standard errors
        ([0.5, 0.6, 0.5, 0.6, 0.5, -0.01], False),  # one sign differs
        ([0.0, 0.0, 0.0], False),
    ],
)
def test_a_claim_wants_three_seeds_of_one_sign_and_two_standard_errors(means, counts):
    cells = {
        (name, seed): {"a": np.full(4, mean * (name == "ours"))}
        for name in ("ours", "theirs")
        for seed, mean in enumerate(means)
    }
    made = ablation_table.Table(("ours", "theirs"), tuple(range(len(means))), cells)
    assert ablation_table.compare(made, "a", "ours", "theirs")["counts"] is counts


def test_a_variants_own_figure_has_each_seeds_mean_and_is_no_claim(tmp_path):
    found = ablation_table.summary(table(tmp_path), "right", "base")
    means = [np.mean(cell("base", seed)["right"]) for seed in (0, 1, 2)]
    assert found["seed_means"] == pytest.approx(means)
    assert found["mean"] == pytest.approx(np.mean(means)) and "counts" not in found


def test_two_figures_of_one_variant_can_be_paired_too(tmp_path):
    made = table(tmp_path)
    found = ablation_table.summary(made, "nll - alone", "better")
    means = [
        np.mean(cell("better", seed)["nll"] - cell("better", seed)["alone"]) for seed in (0, 1, 2)
    ]
    assert found["seed_means"] == pytest.approx(means) and found["counts"]
    # A difference of differences: what the variant adds to it. "alone" is the same in both.
    gain = ablation_table.compare(made, "nll - alone", "better", "base")
    assert gain["mean"] == pytest.approx(
        ablation_table.compare(made, "nll", "better", "base")["mean"]
    )


def test_killed_between_cells_it_measures_each_once(tmp_path):
    calls = []

    def measure(variant, seed):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((variant, seed))
        return cell(variant, seed)

    with pytest.raises(KeyboardInterrupt):
        table(tmp_path, measure=measure)
    assert calls == [("base", 0), ("better", 0), ("base", 1)]
    rest = []
    made = table(tmp_path, measure=lambda *at: rest.append(at) or cell(*at))
    assert rest == [("better", 1), ("base", 2), ("better", 2)]
    again = table(tmp_path, measure=lambda *at: pytest.fail("it is all there"))
    figures = ["nll", "alone", "right", "nll - alone"]
    assert ablation_table.results(again, figures, "base") == ablation_table.results(
        made, figures, "base"
    )


def test_a_cell_of_another_config_is_refused_by_name(tmp_path):
    table(tmp_path)
    path = ablation_table.cell_path(tmp_path / "table", "better", 1)
    path.write_text(path.read_text().replace("better at 1", "better at 7"))
    calls = []

    def measure(*at):
        calls.append(at)
        return cell(*at)

    with pytest.raises(UserError, match=r"better/seed1.json was measured from another config"):
        table(tmp_path, measure=measure)
    assert calls == []
    table(tmp_path, measure=measure, overwrite=True)
    assert calls == [("better", 1)]
    path.write_text('{"figures": []}')
    with pytest.raises(UserError, match=r"seed1.json is not an ablation cell"):
        table(tmp_path, measure=measure)


def test_a_cell_that_fails_is_left_out_with_its_reason_and_tried_again(tmp_path):
    def measure(variant, seed):
        if (variant, seed) == ("better", 1):
            raise FloatingPointError("the loss at step 7 is not finite")
        found = cell(variant, seed)
        return found | {"nll": np.full(Q, math.nan)} if (variant, seed) == ("base", 2) else found

    grown = []
    made = table(tmp_path, measure=measure, after_cell=lambda t: grown.append(len(t.cells)))
    assert grown == [1, 2, 3, 3, 3, 4]
    results = ablation_table.results(made, ["nll"], "base")
    assert results["missing"] == [["base", 2], ["better", 1]]
    assert results["failed"][0] == ["base", 2, f"nll: {Q} of {Q} values are not finite"]
    # What both have is one seed; what one of them has, two.
    entry = results["figures"]["nll"]["better"]
    assert entry["minus_baseline"]["seeds"] == [0] and entry["value"]["seeds"] == [0, 2]
    text = ablation_table.markdown(results)
    assert "(2 of 3 seeds)" in text and "(1 of 3 seeds, ± over documents)" in text
    assert "Failed: better, seed 1 (the loss at step 7 is not finite)." in text
    assert table(tmp_path).failed == {}


def test_where_nothing_can_be_measured_the_reason_is_raised(tmp_path):
    def refuse(variant, seed):
        raise UserError("The gate is shut.")

    with pytest.raises(UserError, match="The gate is shut"):
        table(tmp_path, measure=refuse)
    assert not (tmp_path / "table").exists()


def test_a_failed_seed_ends_a_claim_also_in_a_table_made_of_the_cells_alone(tmp_path):
    seeds = (0, 1, 2, 3)

    def measure(variant, seed):
        if (variant, seed) == ("better", 3):
            raise UserError("Retrieval check failed.")
        return cell(variant, seed)

    def judged(made):
        return [
            ablation_table.compare(made, "nll", "better", "base")["counts"],
            ablation_table.summary(made, "nll - alone", "better")["counts"],
            ablation_table.summary(made, "nll - alone", "base")["counts"],
        ]

    def kept(made):
        ablation_table.write(made, tmp_path / "kept", ["nll", "alone"])
        return ablation_table.read(["base", "better"], seeds, tmp_path / "kept")

    made = table(tmp_path, seeds, measure)
    again = kept(made)
    assert judged(made) == judged(again) == [False, False, True]
    assert again.failed == {("better", 3): "Retrieval check failed"}
    assert again.figures == ("alone", "nll")
    made = table(tmp_path, seeds)
    again = kept(made)
    assert judged(made) == judged(again) == [True, True, True] and not again.failed
    assert ablation_table.compare(again, "nll", "better", "base")["mean"] == pytest.approx(
        ablation_table.compare(made, "nll", "better", "base")["mean"], rel=1e-5
    )
    with pytest.raises(UserError, match="no finished cell"):
        ablation_table.read(["base", "better"], seeds, tmp_path / "elsewhere")


def test_a_table_of_more_figures_than_variants_has_a_row_for_each_figure(tmp_path):
    made = table(tmp_path)
    results = ablation_table.results(made, ["nll", "alone", "right"], "base")
    first = ablation_table.markdown(results).splitlines()[0]
    assert first == "| variant | base | better |"
    results = ablation_table.results(made, ["nll"], "base")
    assert "| nll (n = 40) | minus base |" in ablation_table.markdown(results)


def test_what_was_not_measured_is_missing_and_nothing_is_invented():
    made = ablation_table.Table(("base", "better"), (0,), {("base", 0): cell("base", 0)})
    assert ablation_table.compare(made, "nll", "better", "base") is None
    assert ablation_table.summary(made, "nll", "better") is None
    lines = ablation_table.markdown(ablation_table.results(made, ["nll"], "base")).splitlines()
    assert lines[3] == "| better | missing | missing |"
    assert "Missing: better, seed 0." in lines


def test_documents_that_do_not_pair_are_refused_by_name():
    cells = {
        ("base", 0): {"a": np.zeros(4), "b": np.zeros(5)},
        ("base", 1): {"a": np.zeros(5), "b": np.zeros(5)},
        ("better", 0): {"a": np.zeros(5), "b": np.zeros(5)},
    }
    made = ablation_table.Table(("base", "better"), (0, 1), cells)
    with pytest.raises(
        UserError, match=r"a of better minus base, seed 0: 5 documents cannot be paired with 4"
    ):
        ablation_table.compare(made, "a", "better", "base")
    with pytest.raises(UserError, match=r"base, seed 0: a - b: 4 documents cannot be paired"):
        ablation_table.summary(made, "a - b", "base")
    with pytest.raises(UserError, match=r"base: a: seeds have 4 to 5 documents"):
        ablation_table.summary(made, "a", "base")


def test_an_unknown_figure_names_the_nearest(tmp_path):
    made = table(tmp_path, seeds=[0])
    assert made.figures == ("alone", "nll", "right")
    with pytest.raises(UserError, match=r"base, seed 0 has no metric 'nl'; the closest is nll"):
        ablation_table.summary(made, "nl", "base")
    with pytest.raises(ValueError, match="no cell 'worse'"):
        ablation_table.compare(made, "nll", "worse", "base")


@pytest.mark.parametrize(
    ("variants", "seeds", "says"),
    [
        (["../up"], [0], "'../up' is not a valid variant name"),
        (["end "], [0], "not a valid variant name"),
        ([], [0], "at least one variant"),
        (["a"], [], "at least one variant and one seed"),
        (["a"], [0, -1], "Seed -1 is negative"),
        (["a", "a"], [0], "must be unique"),
        (["a"], [3, 3], "must be unique"),
    ],
)
def test_names_are_those_of_files(tmp_path, variants, seeds, says):
    with pytest.raises(UserError, match=says):
        ablation_table.run(variants, seeds, cell, tmp_path, key)


def test_markdown_is_the_table_its_json_holds(tmp_path):
    """Two digits of the standard error; ✓ where the difference counts; the legend says what ± is over."""
    made = ablation_table.Table(
        ("base", "better"),
        (0, 1, 2),
        {
            (name, seed): {"nll": np.full(4, 2.0 - step * gain), "alone": np.full(4, 3.0)}
            for name, gain in (("base", 0.0), ("better", 0.5))
            for seed, step in enumerate((0.98, 1.0, 1.02))
        },
    )
    results = ablation_table.results(made, ["nll", "nll - alone"], "base")
    text = ablation_table.markdown(json.loads(json.dumps(results)))
    lines = text.splitlines()
    header = "| variant | nll (n = 4) | minus base | nll - alone (n = 4) | minus base |"
    assert lines[0] == header
    assert lines[1] == "| --- | --- | --- | --- | --- |"
    assert lines[2] == "| base | 2.0000 ± 0.0000 |  | -1.0000 ± 0.0000 ✓ |  |"
    better = "| better | 1.5000 ± 0.0058 | -0.5000 ± 0.0058 ✓ | -1.5000 ± 0.0058 ✓ | -0.5000 ± 0.0058 ✓ |"
    assert lines[3] == better
    assert "± is one standard error, over seeds (0, 1, 2)." in text
    assert (
        "at least 3 seeds, none failed, all with the same sign, and more than two standard errors"
        in text
    )
    alone = ablation_table.markdown(ablation_table.results(table(tmp_path, seeds=[0]), ["nll"]))
    assert "of one seed (0); ± is one standard error, over documents." in alone
    assert "minus" not in alone
