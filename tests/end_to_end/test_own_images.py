"""A stranger's folder of pictures, from the README: a memory of its own, then models of its own."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest

import rag_mm
from rag_mm.cli import main
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.stages.shared import world_config


@pytest.fixture(scope="module")
def world(tiny_run, tmp_path_factory):
    """A copy of the run, and pictures of several sizes and kinds, one of them bad."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(tiny_run.workdir, folder / "run")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i, (kind, size) in enumerate([("png", 32), ("jpg", 90), ("webp", 41), ("png", 200)]):
        pixels = np.full((size, size + i, 3), rng.integers(0, 256, 3), np.uint8)
        pixels[: size // 2, : size // 2] = rng.integers(0, 256, 3)
        PIL.Image.fromarray(pixels).save(folder / "pictures" / f"own{i}.{kind}")
        fields = {"image": f"own{i}.{kind}", "caption": f"a purple zebra number {i}"}
        lines.append(json.dumps(fields | {"url": f"http://own/{i}", "license": "CC0"}))
    (folder / "pictures" / "captions.jsonl").write_text("\n".join([*lines, "{"]))
    return folder


def call(capsys, *words: str) -> dict:
    assert main.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_from_a_folder_to_a_picture(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    documents, retriever = "--documents=pictures", "--retriever=run"
    built = call(capsys, "memory", "build", documents, retriever, "--out=mem")
    assert (built["rows"], built["rejected_by_reason"]) == (4, {"not-json": 1})
    found = call(capsys, "memory", "search", "mem", "--image=pictures/own1.jpg", "--html=hits.html")
    assert found["hits"][0]["id"] == "own1"
    assert "http://own/1" in (world / "hits.html").read_text()
    assert call(capsys, "memory", "verify", "mem")["ok"]
    before = len(Memory.open("run/memory"))
    assert call(capsys, "memory", "merge", "run/memory", "mem")["rows"] == before + 4
    # The run's own memory is asked from now on, and what was merged is found and read.
    run = rag_mm.load("run")
    assert len(run.memory) == before + 4
    own = run.memory.ids.index("own2")
    assert run.memory.search(document=run.memory.document(own), k=1).ids[0, 0] == own
    mine = [run.memory.document(own)]
    drawn = run.generate("a purple zebra number 2", documents=mine)
    assert [d["url"] for d in drawn.neighbors] == ["http://own/2"]
    assert drawn.images.shape == (1, 32, 32, 3)
    prompt = "--prompt=a purple zebra number 2"
    made = call(capsys, "generate", "--workdir=run", prompt, "--docs=1", "--out=x.png")
    assert len(made["neighbors"]) == 1 and (world / "x.png").exists()
    removed = call(capsys, "memory", "remove", "run/memory", "--license=CC0")
    assert (removed["rows"], removed["taken_out"]) == (before, 4)
    assert not {"own0", "own1"} & set(rag_mm.load("run").memory.ids)


@pytest.mark.slow
def test_from_a_folder_to_a_trained_run(tmp_path, capsys, monkeypatch):
    """Tokenizer, retriever, memory, neighbors and decoder of one's own, then a picture drawn from them."""
    monkeypatch.chdir(tmp_path)
    scenes = world_config.EmojiWorld(class_share=0.02).scenes("memory", "common")
    (tmp_path / "pictures").mkdir()
    lines = []
    for i in range(120):
        PIL.Image.fromarray(scenes.image(i)).resize((50 + i, 60)).save(f"pictures/p{i}.webp")
        fields = {
            "image": f"p{i}.webp",
            "caption": scenes.full_caption(i),
            "url": f"http://own/{i}",
        }
        lines.append(json.dumps(fields))
    (tmp_path / "pictures" / "captions.jsonl").write_text("\n".join(lines))
    words = ("train", "--config=configs/own_images.py:tiny", "--workdir=mine")
    documents = "--config.world.documents=pictures"
    metrics = call(capsys, *words, documents)["metrics"]
    assert metrics["memory"]["rows"] == 120 and metrics["tokenizer"]["psnr"] > 10
    assert 0 <= metrics["retriever"]["recall_at_1"]["text_to_image"] <= 1
    # Nobody answers for himself: a document's neighbors are others.
    neighbors = np.load("mine/neighbors/train.npy")
    rows = np.arange(len(neighbors))
    assert neighbors.shape == (108, 3, 2) and not (neighbors == rows[:, None, None]).any()
    drawn = call(capsys, "generate", "--workdir=mine", "--prompt=a flag", "--docs=2", "--out=x.png")
    assert len(drawn["neighbors"]) == 2 and (tmp_path / "x.png").exists()
    assert drawn["neighbors"][0]["url"].startswith("http://own/")
    found = call(capsys, "memory", "search", "mine/memory", "--image=pictures/p7.webp")
    assert found["hits"][0]["id"] == "p7"
    told = call(capsys, "caption", "--workdir=mine", "--image=pictures/p7.webp")
    assert len(told["captions"]) == 1
    # Again: nothing to do. With another folder: refused, and said which.
    assert call(capsys, *words, documents)["metrics"] == metrics
    (tmp_path / "pictures" / "captions.jsonl").write_text("\n".join(lines[:-1]))
    assert main.main([*words, documents]) == 2
    assert "world" in capsys.readouterr().err
