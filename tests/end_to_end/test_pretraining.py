"""From documents to a decoder trained on a corpus, by the commands; two processes, killed and resumed."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import PIL.Image
import pytest

import rag_mm
from rag_mm.cli import main
from rag_mm.core import run_folder
from rag_mm.stages.ra_cm3 import decoder_record
from rag_mm.stages.shared import starting_point, world_config

PAGE = pathlib.Path(__file__).with_name("pretraining_page.py")
SCENES = "scenes:easy/tune/test"
TIMEOUT = 900


def call(capsys, *words: str) -> dict:
    code = main.main([*words, "--json"])
    told = capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out)


@pytest.mark.slow
def test_a_decoder_of_a_corpus_is_used_as_others_are(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run.workdir, "run")
    build = ("corpus", "build", f"--documents={SCENES}", "--tokenizer=run", "--out=scenes")
    call(capsys, *build)
    call(capsys, "corpus", "neighbors", "scenes", "--memory=run/memory")
    train = ("train", f"--config={PAGE}", "--workdir=run", "--config.pretraining.corpora=scenes")
    metrics = call(capsys, *train)["metrics"]["pretraining"]
    assert metrics["held_out"]["docs2"]["code_nll"]["n"] == 16
    assert metrics["train"]["held_out_nll_docs0"] > 0

    stage, prompt = "--stage=pretraining", "--prompt=red apple"
    drawn = call(capsys, "generate", "--workdir=run", stage, prompt, "--docs=2", "--out=x.png")
    assert len(drawn["neighbors"]) == 2 and pathlib.Path("x.png").exists()
    told = call(capsys, "caption", "--workdir=run", stage, "--image=x.png", "--docs=1")
    assert len(told["captions"]) == 1
    session = rag_mm.load("run", stage="pretraining")
    image = session.generate("red apple", docs=0).images[0]
    assert session.infill(image, "red apple", (8, 16), docs=1).images.shape == (1, 32, 32, 3)
    exported = call(capsys, "export", "cm3", "run", "cm3", stage)
    assert exported["tensors"] > 5 and pathlib.Path("cm3/config.json").exists()
    # Another stage can start from it, by its name or from elsewhere.
    run = run_folder.open_run("run")
    assert decoder_record.find_folder(run, "pretraining") == run.stage_dir("pretraining")
    shutil.rmtree("run/decoder")
    assert starting_point.find("run").name == "pretraining"


def test_the_pages_of_the_papers_sizes_train_on_a_corpus(tiny_run, tmp_path, capsys, monkeypatch):
    """Shrunk: corpus, memory and retriever are given, and nothing but the decoder is trained."""
    monkeypatch.chdir(tmp_path)
    memory = tiny_run.workdir / "memory"
    tokenizer = f"--tokenizer={tiny_run.workdir}"
    call(capsys, "corpus", "build", f"--documents={SCENES}", tokenizer, "--out=corpus")
    call(capsys, "corpus", "neighbors", "corpus", f"--memory={memory}")
    given = [f"--config.retriever.folder={memory}/retriever", f"--config.memory.folder={memory}"]
    page = "--config=configs/cm3leon.py:350m"
    metrics = call(capsys, "train", page, "--workdir=run", *given, *SHRUNK)["metrics"]
    assert metrics["tokenizer"] == metrics["retriever"] == {}
    assert metrics["memory"].keys() == {"rows", "index"}
    assert metrics["pretraining"]["held_out"]["docs1"]["code_nll"]["n"] == 4
    words = ("generate", "--workdir=run", "--stage=pretraining", "--prompt=red apple")
    assert len(call(capsys, *words, "--docs=1", "--out=x.png")["neighbors"]) == 1
    named = ("--card", "--license=cc-by-4.0")
    call(capsys, "export", "cm3", "run", "cm3", "--stage=pretraining", *named)
    card = pathlib.Path("cm3/README.md").read_text()
    assert "Trained on a corpus, which has no images" in card
    assert "| tokenizer | none: it was given |" in card


def test_a_page_without_its_corpus_is_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for page in ("configs/cm3leon.py:350m", "configs/ra_cm3.py:2.7b"):
        assert main.main(["train", f"--config={page}", "--workdir=run"]) == 2
        said = capsys.readouterr().err
        assert "world: corpus is not a corpus; name a folder made by `rag-mm corpus build`" in said
        assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


SHRUNK = [
    "--config.pretraining.model.num_layers=1",
    "--config.pretraining.model.embed_dim=32",
    "--config.pretraining.model.num_heads=2",
    "--config.pretraining.model.mlp_dim=64",
    "--config.pretraining.loop.num_steps=2",
    "--config.pretraining.loop.log_every=1",
    "--config.pretraining.loop.checkpoint_every=2",
    "--config.pretraining.sequences.max_seq_len=512",
    "--config.pretraining.sequences.max_text_len=24",
    "--config.pretraining.batch_size=2",
    "--config.pretraining.scale.dtype=float32",
    "--config.pretraining.num_held_out=4",
    "--config.pretraining.num_watched=2",
]
MINI = [
    "--config.world.documents=pictures",
    "--config.tokenizer.loop.num_steps=50",
    "--config.tokenizer.loop.checkpoint_every=50",
    "--config.tokenizer.num_init_images=64",
    "--config.tokenizer.num_eval=8",
    "--config.retriever.loop.num_steps=50",
    "--config.retriever.loop.checkpoint_every=50",
    "--config.retriever.batch_size=16",
    "--config.retriever.model.embed_dim=16",
]
DECODER = [
    "--config.pretraining.model.num_layers=1",
    "--config.pretraining.model.embed_dim=64",
    "--config.pretraining.model.mlp_dim=64",
    "--config.pretraining.loop.num_steps=60",
    "--config.pretraining.loop.log_every=5",
    "--config.pretraining.loop.checkpoint_every=10",
    "--config.pretraining.batch_size=2",
    "--config.pretraining.num_held_out=6",
    "--config.pretraining.num_watched=2",
]


def start(folder: pathlib.Path, *words: str, count: int = 1) -> list[subprocess.Popen]:
    """The processes of a command, one device each, that run in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    running = []
    for me in range(count):
        meeting = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}"]
        meeting = [*meeting, f"--process-id={me}"] if count > 1 else []
        program = str(pathlib.Path(sys.executable).with_name("rag-mm"))
        with (folder / f"{me}.log").open("a") as log:
            running.append(
                subprocess.Popen(
                    [program, *words, *meeting], env=env, cwd=folder, stdout=log, stderr=log
                )
            )
    return running


def finish(folder: pathlib.Path, *words: str, count: int = 1) -> None:
    """Runs a command to its end."""
    running = start(folder, *words, count=count)
    try:
        for me, process in enumerate(running):
            assert process.wait(TIMEOUT) == 0, (folder / f"{me}.log").read_text()[-4000:]
    finally:
        for process in running:
            process.kill()


def last_step(stage: pathlib.Path) -> int:
    log = stage / "log.jsonl"
    return json.loads(log.read_text().splitlines()[-1])["step"] if log.exists() else 0


@pytest.fixture
def mini(tmp_path):
    """Models, corpus and neighbors of 90 pictures of several sizes."""
    scenes = world_config.EmojiWorld(class_share=0.02).scenes("memory", "common")
    (tmp_path / "pictures").mkdir()
    lines = []
    for i in range(90):
        image = PIL.Image.fromarray(scenes.image(i)).resize((40 + i, 60)).convert("RGBA")
        image.putalpha(PIL.Image.new("L", image.size, 255 - i))
        image.save(tmp_path / "pictures" / f"p{i}.png")
        lines.append(json.dumps({"image": f"p{i}.png", "caption": scenes.full_caption(i)}))
    (tmp_path / "pictures" / "captions.jsonl").write_text("\n".join(lines))
    models = "--config=configs/cm3leon.py:mini_models"
    finish(tmp_path, "train", models, "--workdir=models", *MINI)
    build = ("corpus", "build", "--documents=pictures", "--tokenizer=models", "--out=corpus")
    finish(tmp_path, *build, "--shard-size=30")
    finish(tmp_path, "corpus", "neighbors", "corpus", "--memory=models/memory")
    return tmp_path


@pytest.mark.slow
def test_mini_trained_by_two_processes_and_killed_ends_with_the_same_bits(mini):
    def words(workdir: str) -> list[str]:
        shutil.copytree(mini / "models", mini / workdir, dirs_exist_ok=True)
        page = ["train", "--config=configs/cm3leon.py:mini", f"--workdir={workdir}"]
        return [*page, *MINI, *DECODER]

    finish(mini, *words("whole"), count=2)
    command, stage = words("killed"), mini / "killed" / "pretraining"
    for after in (15, 40):
        running = start(mini, *command, count=2)
        deadline = time.monotonic() + TIMEOUT
        while last_step(stage) < after:
            for me, process in enumerate(running):
                assert process.poll() is None, (mini / f"{me}.log").read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for process in running:
            process.send_signal(signal.SIGKILL)
        for process in running:
            process.wait(TIMEOUT)
        assert last_step(stage) < 60
    finish(mini, *command, count=2)
    stages = [mini / name / "pretraining" for name in ("killed", "whole")]
    # A manifest holds the digests of the parameters' values; how they lie in files differs.
    ours, theirs = (json.loads((each / "manifest.json").read_text()) for each in stages)
    assert ours["status"] == "done" and ours["fingerprint"] == theirs["fingerprint"]
    assert ours["outputs"] == theirs["outputs"] and any("params" in n for n in ours["outputs"])
    for name in ("log.jsonl", "per_document.json", "decoder.json"):
        assert (stages[0] / name).read_text() == (stages[1] / name).read_text()
    logged = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logged] == list(range(5, 61, 5))
    assert logged[-1]["loss"] < logged[0]["loss"]
