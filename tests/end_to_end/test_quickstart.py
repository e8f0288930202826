"""The whole chain on a small world: what it leaves, that it can be killed, and what it refuses."""

import dataclasses
import functools
import pathlib
import re
import shutil

import numpy as np
import pytest
from whole_run import TRAINED, Quickstart, contents, fingerprints, metrics

import rag_mm
from configs import quickstart as page
from rag_mm import report
from rag_mm.cli import main
from rag_mm.core import files, run_folder
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages.ra_cm3 import write_report
from rag_mm.stages.shared import build_memory, train_tokenizer
from rag_mm.worlds.emoji import class_splits

CONFIG = "--config=configs/quickstart.py:tiny"
SCRIPTS_READ = """
tokenizer.psnr tokenizer.scorer_ceiling.joint retriever.recall_at_1.text_to_image
retriever.same_class_at_2 memory.recall_at_10 decoder.art_nll.docs0 decoder.art_nll.docs1
decoder.art_nll.docs2 decoder.joint_accuracy.docs2 control.joint_accuracy
baselines.hit_itself.joint_accuracy decoder.cider.docs2 quickstart.wall_seconds
quickstart.peak_rss_gib quickstart.retrieval_ms quickstart.generation_ms
quickstart.retrieval_share
""".split()


def at(tree: dict, path: str):
    return functools.reduce(lambda node, key: node[key], path.split("."), tree)


@pytest.mark.parametrize("path", SCRIPTS_READ)
def test_what_scripts_read_is_measured(tiny_run, path):
    value = at(files.read_json(tiny_run.workdir / "metrics.json"), path)
    number = value.get("accuracy", value.get("mean")) if isinstance(value, dict) else value
    assert np.isfinite(number)
    if "accuracy" in path:
        assert set(value) >= {"accuracy", "ci95", "n"}


def test_it_ends_with_the_table_and_where_the_report_is(tiny_run):
    table = report.summary_table(files.read_json(tiny_run.workdir / "metrics.json"))
    assert len(table) == 11
    assert all(f"\n{label} " in f"\n{tiny_run.stdout}" for label, _, _ in table)
    assert tiny_run.stdout.splitlines()[-1] == f"Report: {tiny_run.workdir.name}/report.html"
    assert "Traceback" not in tiny_run.stderr and "Warning" not in tiny_run.stderr


def test_the_page_stands_alone(tiny_run):
    text = (tiny_run.workdir / "report.html").read_text()
    assert all(label in text for label, _, _ in report.summary_table({}))
    assert not re.search(r"<script|(src|href)\s*=\s*[\"']?(https?:)?//", text)
    assert list((tiny_run.workdir / "report" / "figures").glob("*.png"))


def test_the_first_screen_has_a_row_an_entity(tiny_run):
    """As many held-out entities as the small world has, each once; retrieval is a part of the time."""
    text = (tiny_run.workdir / "report.html").read_text()
    first_screen = text[: text.index("<nav>")]
    captions = re.findall(r'<div class="scene">\s*<p dir="auto">(.+?) at the ', first_screen)
    assert len(captions) == len(set(captions)) >= 4
    assert first_screen.count("flag of ") >= 4
    assert (tiny_run.workdir / "report" / "figures" / "story.png").exists()
    costs = files.read_json(tiny_run.workdir / "metrics.json")["quickstart"]
    assert 0 < costs["retrieval_share"] < 1 < costs["generation_ms"] / costs["retrieval_ms"]


def test_the_first_sentence_says_what_the_retriever_has_seen(tiny_run):
    text = (tiny_run.workdir / "report.html").read_text()
    lead = re.search(r'<p class="lead[^>]*>(.+?)</p>', text, re.DOTALL)[1]
    assert lead.startswith("The retriever has seen other images of the held-out entities")
    unseen = write_report.what_was_seen(("common", "rare_seen"))
    assert unseen.startswith("No model has seen the held-out entities")
    for split in ("held_out", "tune", "test"):
        assert lead.startswith(write_report.what_was_seen(("common", split)))
    # Bounds of the retrieval, and what some heads do before training, are on the page too.
    assert "more than 50 % equal codes" in text and "begin as induction heads" in text


def test_every_stage_is_done(tiny_run):
    assert set(fingerprints(tiny_run.workdir)) == set(page.STAGES)
    assert all(fingerprints(tiny_run.workdir).values())
    assert not list(tiny_run.workdir.rglob("*orbax-checkpoint-tmp*"))


def test_training_reads_no_document_of_a_held_out_class(tiny_run):
    """Ids of scenes are LEVEL-CLASS-CONFIGURATION; version 1 of the memory is what training saw."""
    seen = Memory.open(tiny_run.workdir / "memory", version=build_memory.SEEN_VERSION)
    whole = Memory.open(tiny_run.workdir / "memory")
    held_out = set(class_splits.classes("held_out").tolist())
    assert held_out.isdisjoint(int(name.split("-")[1]) for name in seen.ids)
    assert {int(name.split("-")[1]) for name in whole.ids[len(seen) :]} <= held_out
    assert len(whole) > len(seen)
    found = files.read_array(tiny_run.workdir / "neighbors" / "train.npy")
    assert found.max() < len(seen) and (found >= 0).mean() > 0.9


def test_a_second_run_changes_nothing(finished, capsys):
    before = contents(finished)
    assert main.main(["quickstart", CONFIG, f"--workdir={finished}"]) == 0
    assert contents(finished) == before
    assert capsys.readouterr().out.splitlines()[-1].endswith("report.html")


def test_documents_added_to_the_runs_memory_leave_its_stages_as_they_are(finished, tiny_run):
    """The report is made again, from the memory that the stage `memory` finished with."""
    run = run_folder.open_run(finished)
    own = build_memory.open_memory(run)
    added = dataclasses.replace(own.document(0), id="mine")
    own.add([added], train_tokenizer.load_tokenizer(finished))
    shutil.rmtree(finished / "report")
    assert main.main(["quickstart", CONFIG, f"--workdir={finished}"]) == 0
    assert fingerprints(finished) == fingerprints(tiny_run.workdir)
    assert build_memory.open_memory(run).ids == own.ids
    assert rag_mm.load(str(finished)).memory.ids == (*own.ids, "mine")


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_byte(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def refusal(capsys, *words: str) -> str:
    assert main.main([*words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("rag-mm: ")
    return err


@pytest.mark.parametrize(
    ("stage", "folder"),
    [
        ("tokenizer", "tokenizer/frozen/vocabulary.json"),
        ("tokenizer", "tokenizer/frozen/params.safetensors"),
        ("retriever", "retriever/checkpoints"),
        ("decoder", "decoder/params"),
        ("memory", "memory/v000001"),
        ("neighbors", "neighbors/train.npy"),
    ],
)
def test_an_edited_stage_is_refused_by_name(finished, capsys, stage, folder):
    path = finished / folder
    flip_a_byte(largest_file(path) if path.is_dir() else path)
    before = contents(finished)
    said = refusal(capsys, "quickstart", CONFIG, f"--workdir={finished}")
    assert f"Stage {stage!r} was edited" in said and "--overwrite" in said
    assert contents(finished) == before


def test_a_changed_value_is_refused_by_name(finished, capsys):
    before = contents(finished)
    changed = "--config.retriever.loop.num_steps=41"
    said = refusal(capsys, "quickstart", CONFIG, f"--workdir={finished}", changed)
    assert "Stage 'retriever'" in said and "loop.num_steps was 40, now 41" in said
    assert contents(finished) == before


@pytest.mark.slow
def test_from_scratch_it_gives_the_same_bits(quickstart, tiny_run):
    done = quickstart.run("--json")
    assert done.returncode == 0, done.stderr[-4000:]
    assert metrics(quickstart.workdir) == metrics(tiny_run.workdir)
    assert fingerprints(quickstart.workdir) == fingerprints(tiny_run.workdir)


@pytest.mark.slow
def test_killed_inside_each_stage_it_gives_the_same_bits(quickstart, tiny_run):
    """Each process goes on with the stage in which the one before was killed."""
    for before, stage in zip(("", *page.STAGES), page.STAGES, strict=False):
        said = quickstart.kill_inside(stage)
        assert quickstart.status(stage) == "running"
        assert not before or f"{before}: resuming" in said
    done = quickstart.run()
    assert done.returncode == 0, done.stderr[-4000:]
    assert metrics(quickstart.workdir) == metrics(tiny_run.workdir)
    assert fingerprints(quickstart.workdir) == fingerprints(tiny_run.workdir)
    assert not list(quickstart.workdir.rglob("*tmp*"))
    assert all((quickstart.workdir / stage / "checkpoints").is_dir() for stage in TRAINED)


@pytest.mark.slow
def test_overwrite_mends_an_edited_stage(finished, tiny_run):
    """The same seed makes the same files again, so what was made from them stands."""
    flip_a_byte(finished / "tokenizer" / "frozen" / "vocabulary.json")
    flip_a_byte(largest_file(finished / "decoder" / "params"))
    done = Quickstart(finished).run("--overwrite")
    assert done.returncode == 0, done.stderr[-4000:]
    assert metrics(finished) == metrics(tiny_run.workdir)
    assert fingerprints(finished) == fingerprints(tiny_run.workdir)


@pytest.mark.slow
def test_overwrite_rebuilds_what_another_config_changes(finished, tiny_run):
    """A changed value of one stage rebuilds it and all that reads it, and leaves the rest alone."""
    changed = "--config.generation.num_seen=8"
    done = Quickstart(finished).run(changed, "--overwrite")
    assert done.returncode == 0, done.stderr[-4000:]
    old, new = fingerprints(tiny_run.workdir), fingerprints(finished)
    rebuilt = {stage for stage in old if old[stage] != new[stage]}
    assert rebuilt == {"generation", "evaluation", "report"}
    assert Quickstart(finished).run(changed).returncode == 0
    shutil.rmtree(finished)
