"""Ablations of a chain of three stand-in stages: cells share what they can, resume, and refuse early."""

import copy
import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest

from rag_mm.core import files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.stages import chain, chain_config, run_ablation
from rag_mm.stages.stage import Stage

CONFIG = {
    "stages": ["words", "model", "exam"],
    "seed": 0,
    "world": {},
    "words": {"count": 5},
    "model": {"alpha": 0.5, "sizes": [2, 3], "fails": False},
    "exam": {"num_test": 8},
    "ablation": {
        "variants": {
            "base 0.5": {},
            "alpha": {"model.alpha": 2},
            "short": {"exam.num_test": 4, "model.sizes": [1]},
        },
        "seeds": [0, 1, 2],
        "figures": ["held_out.docs2.nll"],
        "pairs": [["held_out.docs2.nll", "held_out.docs0.nll"]],
        "baseline": "base 0.5",
        "stage": "exam",
    },
}


@dataclasses.dataclass(frozen=True)
class Words:
    """The seed alone tells one from another."""

    seed: int
    world: Mapping
    count: int = 5


@dataclasses.dataclass(frozen=True)
class Model:
    seed: int
    world: Mapping
    alpha: float = 0.5
    sizes: tuple[int, ...] = ()
    fails: bool = False

    def __post_init__(self):
        if self.alpha < 0:
            raise ValueError(f"alpha is {self.alpha}, give 0 or more")


@dataclasses.dataclass(frozen=True)
class Exam:
    seed: int
    world: Mapping
    num_test: int = 8


@pytest.fixture
def made(monkeypatch):
    """The stages that were computed, as (stage, seed, alpha)."""
    calls = []

    def words(config, run, stage_dir):
        calls.append(("words", config.seed))
        (stage_dir / "words.txt").write_text("a " * config.count)
        return {"count": config.count}

    def model(config, run, stage_dir):
        calls.append(("model", config.seed, config.alpha))
        if config.fails:
            raise FloatingPointError("model: the loss at step 3 is not finite")
        files.write_array(stage_dir / "weights.npy", np.full(2, config.alpha))
        return {}

    def exam(config, run, stage_dir):
        weights = files.read_array(run.finished_stage("model") / "weights.npy")
        calls.append(("exam", config.seed, float(weights[0])))
        noise = np.random.default_rng(config.seed).normal(size=config.num_test)
        nll = {"docs0": noise, "docs2": noise - weights[0] - 0.01 * config.seed}
        values = {name: {"nll": found.tolist()} for name, found in nll.items()}
        files.write_json(stage_dir / "per_document.json", {"held_out": values})
        return {}

    stages = {
        "words": Stage(Words, (), words),
        "model": Stage(Model, ("words",), model),
        "exam": Stage(Exam, ("words", "model"), exam),
    }
    monkeypatch.setattr(chain_config, "STAGES", stages)
    return calls


@pytest.fixture
def config():
    made = copy.deepcopy(CONFIG)
    del made["ablation"]["variants"]["short"]  # Its documents do not pair with the others'.
    return made


def test_a_table_of_runs_that_share_their_early_stages(made, config, tmp_path):
    found = run_ablation.run_ablation(config, tmp_path / "table")
    assert [call for call in made if call[0] == "words"] == [("words", seed) for seed in (0, 1, 2)]
    assert len([call for call in made if call[0] == "model"]) == 6
    assert found["variants"] == ["base 0.5", "alpha"] and found["missing"] == []
    entry = found["figures"]["held_out.docs2.nll"]["alpha"]["minus_baseline"]
    assert entry["mean"] == pytest.approx(-1.5) and entry["counts"]
    gain = found["figures"]["held_out.docs2.nll - held_out.docs0.nll"]["alpha"]["value"]
    assert gain["seed_means"] == pytest.approx([-2.0, -2.01, -2.02]) and gain["counts"]
    assert files.read_json(tmp_path / "table" / "table.json") == found
    assert "| alpha |" in (tmp_path / "table" / "table.md").read_text()


def test_reused_stages_are_those_that_a_run_alone_would_make(made, config, tmp_path):
    run_ablation.run_ablation(config, tmp_path / "table", seeds=[1])
    cell = run_folder.open_run(tmp_path / "table" / "alpha" / "seed1")
    assert "ablation" not in cell.config and cell.config["model"]["alpha"] == 2.0
    alone = chain.run_chain(cell.config, tmp_path / "alone")
    for stage in CONFIG["stages"]:
        assert alone.manifest(stage) == cell.manifest(stage)
    costs = cell.metrics["machine"]
    assert costs["words"]["borrowed_seconds"] == costs["words"]["wall_seconds"]
    assert costs["model"]["borrowed_seconds"] == 0


def test_a_run_by_hand_can_be_reused_too(made, config, tmp_path):
    alone = {key: value for key, value in config.items() if key != "ablation"}
    chain.run_chain(alone, tmp_path / "alone")
    made.clear()
    lender = tmp_path / "alone"
    run_ablation.run_ablation(config, tmp_path / "table", seeds=[0], reuse_from=[lender])
    assert made == [("model", 0, 2.0), ("exam", 0, 2.0)]
    with pytest.raises(UserError, match="is not a run"):
        run_ablation.run_ablation(config, tmp_path / "new", reuse_from=[tmp_path])
    assert not (tmp_path / "new").exists()


def test_what_is_measured_is_not_measured_again(made, config, tmp_path):
    """More seeds, other columns and a text of the report ask for no cell again."""
    run_ablation.run_ablation(config, tmp_path / "table", seeds=[0])
    made.clear()
    changed = {key: config["ablation"][key] for key in ("variants", "stage")}
    found = run_ablation.run_ablation(
        {**config, "ablation": changed}, tmp_path / "table", seeds=[0]
    )
    assert made == []
    assert list(found["figures"]) == ["held_out.docs0.nll", "held_out.docs2.nll"]
    run_ablation.run_ablation(config, tmp_path / "table")
    assert {call[1] for call in made} == {1, 2}


def test_a_changed_config_is_refused_before_anything_runs(made, config, tmp_path):
    run_ablation.run_ablation(config, tmp_path / "table", seeds=[0])
    made.clear()
    config["ablation"]["variants"]["alpha"]["model.alpha"] = 3.0
    with pytest.raises(UserError, match=r"alpha/seed0.json was measured from another config"):
        run_ablation.run_ablation(config, tmp_path / "table")
    (tmp_path / "table" / "alpha" / "seed0.json").unlink()
    with pytest.raises(UserError, match=r"alpha, seed 0: .*alpha was 2.0, now 3.0"):
        run_ablation.run_ablation(config, tmp_path / "table")
    assert made == []
    run_ablation.run_ablation(config, tmp_path / "table", seeds=[0], overwrite=True)
    assert made == [("model", 0, 3.0), ("exam", 0, 3.0)]


def test_a_variant_that_diverges_is_missing_and_the_rest_is_there(made, config, tmp_path):
    config["ablation"]["variants"]["broken"] = {"model.fails": True}
    found = run_ablation.run_ablation(config, tmp_path / "table", seeds=[0, 1])
    assert found["missing"] == [["broken", 0], ["broken", 1]]
    assert found["failed"][0][2] == "model: the loss at step 3 is not finite"
    assert found["figures"]["held_out.docs2.nll"]["broken"]["value"] is None


def test_variants_with_other_test_documents_do_not_pair(made, tmp_path):
    with pytest.raises(UserError, match="4 documents cannot be paired with 8"):
        run_ablation.run_ablation(copy.deepcopy(CONFIG), tmp_path / "table")


def change(config: dict, path: str, value: object) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        config = config[parent]
    if value is None:
        del config[last]
    else:
        config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("ablation", None, "no 'ablation'"),
        ("ablation/variants", None, "variants"),
        ("ablation/variants", {}, "baseline 'base 0.5' is not a variant"),
        ("ablation/variants", ["a", "b"], "a dict of dicts"),
        ("ablation/variants/alpha", 3, "a dict of dicts"),
        ("ablation/variants/alpha", {"model.beta": 1}, "Variant 'alpha': .* no key 'model.beta'"),
        ("ablation/variants/alpha", {"model.alpha": "x"}, "Variant 'alpha': .*does not fit"),
        ("ablation/variants/alpha", {"model.alpha": -1.0}, "Variant 'alpha': model: alpha is -1"),
        ("ablation/variants/alpha", {"seed": 3}, "cannot set the seed"),
        ("ablation/variants/a:b", {}, "'a:b' is not a valid variant name"),
        ("ablation/seeds", [], "at least one variant and one seed"),
        ("ablation/seeds", [0, -2], "Seed -2 is negative"),
        ("ablation/seeds", ["a"], "seeds is .*; give tuple"),
        ("ablation/pairs", [["a"]], "a pair must be two figures"),
        ("ablation/pairs", ["ab"], "a pair must be two figures"),
        ("ablation/stage", "evaluation", "'evaluation', which is not among the config's stages"),
        ("ablation/figure", ["a"], "no setting 'figure'"),
        ("stages", ["words", "paint"], "no stage 'paint'|not among the config's stages"),
    ],
)
def test_a_bad_config_is_refused_before_anything_runs(made, config, tmp_path, path, value, says):
    change(config, path, value)
    with pytest.raises(UserError, match=says):
        run_ablation.run_ablation(config, tmp_path / "table")
    assert made == [] and not (tmp_path / "table").exists()


def test_an_unknown_figure_is_told_after_the_first_cell(made, config, tmp_path):
    config["ablation"]["figures"] = ["held_out.docs1.nll"]
    with pytest.raises(UserError, match=r"no metric 'held_out.docs1.nll'; the closest is"):
        run_ablation.run_ablation(config, tmp_path / "table")
    assert len([call for call in made if call[0] == "exam"]) == 1


def test_a_table_is_made_again_from_its_cells_alone(made, config, tmp_path):
    results = run_ablation.run_ablation(config, tmp_path / "runs")
    kept = (tmp_path / "runs" / "cells").rename(tmp_path / "kept")
    made.clear()
    again = run_ablation.make_table(config, kept)
    assert made == [] and (kept / "table.md").exists()
    for figure, entries in results["figures"].items():
        for variant, entry in entries.items():
            means = again["figures"][figure][variant]["value"]["seed_means"]
            assert means == pytest.approx(entry["value"]["seed_means"], rel=1e-5)
    assert "machine" in files.read_json(kept / "alpha" / "seed1.metrics.json")
    assert set(files.read_json(kept / "alpha" / "seed1.json")["figures"]) == {
        "held_out.docs0.nll",
        "held_out.docs2.nll",
    }
    (kept / "alpha" / "seed1.json").unlink()
    assert run_ablation.make_table(config, kept)["missing"] == [["alpha", 1]]
    assert results["missing"] == []


def test_a_run_is_no_place_for_a_table(made, config, tmp_path):
    alone = {key: value for key, value in config.items() if key != "ablation"}
    chain.run_chain(alone, tmp_path / "alone")
    with pytest.raises(UserError, match="is a run; give the ablation another folder"):
        run_ablation.run_ablation(config, tmp_path / "alone")


def test_the_shipped_pages_ablation_fits(tmp_path):
    """Every cell's config is one that a chain takes, and no two are alike."""
    page = chain_config.load("configs/copy_probe.py:quick")
    plan = run_ablation._plan(page, None)
    cells = run_ablation._cells(page, plan, tmp_path)
    keys = {cell.key for cell in cells.values()}
    assert len(keys) == len(cells) == len(plan.variants) * len(plan.seeds) >= 6
    assert not list(tmp_path.iterdir())
