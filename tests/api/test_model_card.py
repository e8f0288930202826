"""The model card beside exported weights: read by the Hub's own library, and honest about the run."""

import dataclasses
import json
import pathlib
import sys

import pytest
import test_exporting
from etils import epath
from stand_in import make_documents

from rag_mm.cli import main
from rag_mm.core import files, run_folder
from rag_mm.memory import retrieval_memory
from rag_mm.report import markdown
from rag_mm.stages.shared import train_retriever

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "parity"))
import tiny

hub = pytest.importorskip("huggingface_hub")

STRANGE = 'CC "BY" \\ 4.0\n---\n| <b>x</b> \x1b[0m \ufffe \U0001f600'
METRICS = {
    "decoder": {
        "joint_accuracy": {"docs2": {"accuracy": 0.75, "ci95": 0.05, "n": 256}},
        "paired": {"joint_docs2_minus_control": {"mean": 0.7344, "ci95": 0.0542, "n": 256}},
    },
    "control": {"joint_accuracy": {"accuracy": 0.01, "ci95": 0.02, "n": 256}},
    "sft": {"tasks": {"tuned": {"swap": {"joint": {"accuracy": 0.625, "ci95": 0.1, "n": 64}}}}},
    "machine": {"decoder": {"wall_seconds": 4321.0}},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with a memory of documents under two licenses, and one without."""
    folder = test_exporting.make_run(
        tmp_path_factory.mktemp("card") / "run", test_exporting.DECODER
    )
    run = run_folder.Run(epath.Path(folder))
    run.save_config(
        {
            "seed": 7,
            "world": {"kind": "emoji"},
            "retriever": {"splits": ["common", "rare_seen"], "loop": {"num_steps": 280}},
            "decoder": {"batch_size": 16, "loop": {"num_steps": 1400}},
        }
    )
    documents = make_documents(6)
    documents[1] = dataclasses.replace(documents[1], license=STRANGE)
    documents[2] = dataclasses.replace(documents[2], license=None)
    encoder = train_retriever.load_encoder(run.workdir)
    run_folder.run_stage(
        run, "memory", {}, (), lambda run, stage_dir: build(stage_dir, documents, encoder)
    )
    files.write_json(run.workdir / "metrics.json", METRICS)
    files.write_json(run.workdir / run_folder.PAGE, {"page": "/home/someone/pages/mine.py:full"})
    return folder


def build(stage_dir, documents, encoder):
    retrieval_memory.Memory.build(stage_dir, documents, encoder)
    return {}


def export(capsys, *words):
    code = main.main(["export", *map(str, words), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else err


def test_a_trained_decoder_has_a_card_that_the_hub_reads(tmp_path, capsys, trained):
    out = tmp_path / "out"
    assert export(capsys, "cm3", trained, out, "--card", "--license=apache-2.0")[0] == 0
    card = hub.ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("rag_mm", "any-to-any")
    assert data["license"] == "apache-2.0" and "arxiv:2211.12561" in data["tags"]
    counted = {each["license"]: each["documents"] for each in data["memory_licenses"]}
    assert counted["CC0"] == 4 and counted["unknown"] == 1 and len(counted) == 3
    (strange,) = set(counted) - {"CC0", "unknown"}
    assert strange.startswith('CC "BY" \\ 4.0 --- | <b>x</b>') and "\x1b" not in strange
    title, first = card.text.strip().split("\n\n")[:2]
    assert title == "# RA-CM3, exported by rag_mm"
    assert first.startswith("No model has seen the held-out entities, not even the retriever.")


def test_the_card_tells_training_metrics_controls_and_licenses(tmp_path, capsys, trained):
    assert export(capsys, "cm3", trained, tmp_path / "out", "--card")[0] == 0
    text = (tmp_path / "out" / "README.md").read_text()
    for row in (
        "| config page | mine.py:full |",
        "| seed | 7 |",
        "2 docs: 75.0 % ± 5.0 |",
        "baseline: 1.0 % ± 2.0",
        r"| joint\_docs2\_minus\_control | 0.7344 ± 0.0542 (n = 256) |",
        "| CC0 | 4 |",
        "| none stated | 1 |",
        r"\<b\>x\</b\>",
        "Nobody has stated a license of the weights",
    ):
        assert row in text
    assert "1400 | 16" in text and "someone" not in text and "4321" not in text
    assert 'license: "unknown"' in text


def test_the_card_of_another_stage_tells_its_figures_alone(tmp_path, capsys, trained):
    words = (tmp_path / "out", "--card", "--stage=sft")
    assert export(capsys, "cm3", trained, *words)[0] == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "tasks.tuned.swap.joint" in text and "75.0 %" not in text and "control" not in text


def test_an_export_as_clip_tells_its_own_kind(tmp_path, capsys, trained):
    assert export(capsys, "clip", trained, tmp_path / "out", "--card")[0] == 0
    card = hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert "tuned" not in card.text
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert card.data.library_name == "transformers" and "CLIPModel" in card.text


def test_an_imported_model_is_not_told_to_be_trained_here(tmp_path, capsys):
    checkpoint = tiny.write(tmp_path / "a", "llama_gqa")
    assert main.main(["import", "llama", str(checkpoint), f"--out={tmp_path / 'run'}"]) == 0
    capsys.readouterr()
    assert export(capsys, "llama", tmp_path / "run", tmp_path / "b", "--card")[0] == 0
    card = hub.ModelCard.load(tmp_path / "b" / "README.md")
    assert card.data.pipeline_tag == "text-generation" and "memory_licenses" not in card.data
    assert "What this model saw in training is not known here" in card.text
    assert "None were measured." in card.text and "seed" not in card.text


def test_a_damaged_run_is_one_sentence_and_writes_nothing(tmp_path, capsys, trained):
    metrics = pathlib.Path(trained) / "metrics.json"
    before = metrics.read_text()
    metrics.write_text('{"decoder": {"joint_accuracy": {"docs2": {"accuracy": 1, "ci95": "x"}}}}')
    code, message = export(capsys, "cm3", trained, tmp_path / "out", "--card")
    metrics.write_text(before)
    assert code == 2 and "export without --card" in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_license_needs_a_card(tmp_path, capsys, trained):
    code, message = export(capsys, "cm3", trained, tmp_path / "out", "--license=mit")
    assert code == 2 and "give it with --card" in message


@pytest.mark.parametrize("text", [STRANGE, "plain", "'", "é: # ]", "\x85\u2028\ud800", "a" * 999])
def test_any_text_is_a_yaml_string(text):
    yaml = pytest.importorskip("yaml")
    line = markdown.yaml_string(text)
    read = yaml.safe_load(f"key: {line}")["key"]
    assert "\n" not in line and len(read) <= markdown.MAX_CHARACTERS + 1
    if text.isprintable() and len(text) < 99:
        assert read == text
