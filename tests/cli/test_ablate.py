"""`rag-mm ablate`: a page's variants and seeds, one-sentence user errors, and the table."""

import json

import numpy as np
import pytest

from rag_mm.cli import main
from rag_mm.core import files, run_folder
from rag_mm.core.errors import UserError
from rag_mm.eval import ablation_table
from rag_mm.stages import chain_config
from rag_mm.stages import run_ablation as ablation

# The whole chain but for the report.
PAGE = '''
"""A page."""
from configs import quickstart

PRESETS = ("alpha", "plain")


def get_config(preset):
    config = quickstart.tiny()
    config["stages"] = quickstart.STAGES[:-1]
    if preset == "plain":
        del config["ablation"]
        return config
    return config | {
        "ablation": {
            "variants": {"alpha 0.1": {}, "alpha 1.0": {"decoder.alpha": 1.0}},
            "seeds": (0, 1),
            "figures": ("held_out.docs2.art_nll",),
            "pairs": (("held_out.docs1.art_nll", "held_out.docs0.art_nll"),),
            "baseline": "alpha 0.1",
            "stage": "evaluation",
        }
    }
'''


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """The current folder, which holds the page."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text(PAGE)
    return tmp_path


@pytest.fixture
def measured(monkeypatch):
    """Replaces hours of training; records its arguments and returns a table with a missing cell."""
    asked = {}

    def run_ablation(config, workdir, **options):
        asked.update(options, workdir=workdir, config=config)
        seeds = options["seeds"] or config["ablation"]["seeds"]
        values = np.arange(4.0)
        cells = {("a", seed): {"nll": values + seed} for seed in seeds}
        cells |= {("b", seed): {"nll": 2 * values + seed} for seed in seeds[:-1]}
        return ablation_table.results(
            ablation_table.Table(("a", "b"), tuple(seeds), cells), ["nll"], "a"
        )

    monkeypatch.setattr(ablation, "run_ablation", run_ablation)
    return asked


def test_a_page_spells_out_overrides_in_dotted_keys(desk):
    plain = chain_config.load("page.py", {"ablation.seeds": "4,5", "decoder.alpha": "0.2"})
    variants = {"alpha 0.1": {}, "alpha 1.0": {"decoder.alpha": 1.0}}
    assert plain["ablation"]["variants"] == variants and plain["ablation"]["seeds"] == [4, 5]
    with pytest.raises(UserError, match="no key 'ablation.variants.alpha 1.0.decoder.alpha'"):
        chain_config.load("page.py", {"ablation.variants.alpha 1.0.decoder.alpha": "2"})


def test_it_prints_the_table_and_fails_if_a_cell_is_missing(desk, measured, capsys):
    words = ["ablate", "--config=page.py", "--workdir=out", "--seeds", "3", "7", "--reuse", "run"]
    assert main.main([*words, "--overwrite"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("| variant | nll (n = 4) | minus a |\n")
    assert "| b | 6.0 ± 1.3 (1 of 2 seeds, ± over documents) |" in out
    assert "Missing: b, seed 7." in out and out.splitlines()[-1] == "Table: out/table.md"
    wanted = {"seeds": [3, 7], "reuse_from": ["run"], "overwrite": True, "workdir": "out"}
    assert {name: measured[name] for name in wanted} == wanted


def test_json_holds_the_table(desk, measured, capsys):
    words = ["--workdir=out", "--config.ablation.seeds=2", "--json"]
    assert main.main(["ablate", "--config=page.py:alpha", *words]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["workdir"] == "out" and result["ok"] is False
    assert result["table"]["missing"] == [["b", 2]]
    assert result["table"]["figures"]["nll"]["a"]["value"]["seed_means"] == [3.5]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--workdir=out", "required: --config"),
        ("--config=page.py", "required: --workdir"),
        ("--config=page.py --workdir=", "--workdir is empty"),
        ("--config=page.py:beta --workdir=out", "no preset 'beta'; it has alpha, plain"),
        ("--config=page.py:plain --workdir=out", "no 'ablation'"),
        ("--config=page.py --workdir=out --seeds x", "--seeds: invalid int value"),
        ("--config=page.py --workdir=out --seeds -1", "Seed -1 is negative"),
        ("--config=page.py --workdir=out --seeds 1 1", "must be unique"),
        ("--config=page.py --workdir=out --reuse no", "no is not a run"),
        ("--config=page.py --workdir=page.py", "page.py/alpha 0.1/seed0 cannot be created"),
        ("--config=page.py --workdir=out --config.ablation.baseline=x", "'x' is not a variant"),
        ("--config=page.py --workdir=out --config.ablation.stage=report", "stage is 'report'"),
        ("--config=page.py --workdir=out --config.decoder.alfa=1", "no key 'decoder.alfa'"),
        ("--config=page.py --workdir=out --config.decoder.batch_size=0", "batch_size is 0"),
    ],
)
def test_a_user_error_gives_one_sentence_and_writes_nothing(desk, capsys, words, says):
    assert main.main(["ablate", *words.split(" ")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and says in err and "Traceback" not in err
    assert err.splitlines()[-1].startswith("rag-mm: ")
    assert [path.name for path in desk.iterdir()] == ["page.py"]


@pytest.mark.slow
def test_the_real_chain_at_two_seeds(desk, tiny_run, capsys):
    """Seed 0 is reused from a finished run; variants of the decoder share all earlier stages."""
    words = ["ablate", "--config=page.py", "--workdir=out", f"--reuse={tiny_run.workdir}"]
    assert main.main([*words, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["table"]
    assert table["missing"] == [] and table["seeds"] == [0, 1]

    def stage(variant: str, seed: int, name: str) -> run_folder.StageManifest:
        return run_folder.open_run(desk / "out" / variant / f"seed{seed}").manifest(name)

    for name in ("tokenizer", "decoder", "evaluation"):
        assert stage("alpha 0.1", 0, name) == run_folder.open_run(tiny_run.workdir).manifest(name)
    for seed in (0, 1):
        for name in ("tokenizer", "retriever", "memory", "neighbors"):
            assert stage("alpha 0.1", seed, name) == stage("alpha 1.0", seed, name)
        for name in ("decoder", "evaluation"):
            fingerprints = {stage(v, seed, name).fingerprint for v in ("alpha 0.1", "alpha 1.0")}
            assert len(fingerprints) == 2

    def nll(variant: str, seed: int, docs: str) -> np.ndarray:
        path = desk / "out" / variant / f"seed{seed}" / "evaluation" / "per_document.json"
        return np.array(files.read_json(path)["held_out"][docs]["art_nll"])

    entry = table["figures"]["held_out.docs2.art_nll"]["alpha 1.0"]
    means = [
        np.mean(nll("alpha 1.0", seed, "docs2") - nll("alpha 0.1", seed, "docs2"))
        for seed in (0, 1)
    ]
    assert entry["minus_baseline"]["seed_means"] == pytest.approx(means)
    pair = table["figures"]["held_out.docs1.art_nll - held_out.docs0.art_nll"]["alpha 0.1"]["value"]
    means = [
        np.mean(nll("alpha 0.1", seed, "docs1") - nll("alpha 0.1", seed, "docs0"))
        for seed in (0, 1)
    ]
    assert pair["seed_means"] == pytest.approx(means) and pair["counts"] is False
    before = files.read_json(desk / "out" / "table.json")
    assert main.main(words) == 0
    assert files.read_json(desk / "out" / "table.json") == before
    assert "already done" in capsys.readouterr().err
