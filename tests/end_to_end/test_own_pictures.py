"""A stranger's folder of pictures, from the README: a memory of its own, a page of hits, then drawn from."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest

import rag_mm
from rag_mm.cli import main
from rag_mm.memory.memory import Memory


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
