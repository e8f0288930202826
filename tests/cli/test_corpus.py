"""`rag-mm corpus` on scenes, with the tokenizer and the memory of a finished run."""

import json
import pathlib

import numpy as np
import pytest

from rag_mm.cli import main
from rag_mm.corpus import corpus_reader, neighbor_rows

SCENES = "scenes:easy/tune/test"


@pytest.fixture(scope="module")
def built(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    words = [f"--documents={SCENES}", f"--tokenizer={tiny_run.workdir}", f"--out={folder}"]
    assert main.main(["corpus", "build", *words, "--shard-size=200"]) == 0
    return folder


def test_stats_are_those_of_the_documents(built, capsys):
    assert main.main(["corpus", "stats", str(built), "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    corpus = corpus_reader.TokenCorpus(built)
    assert stats["documents"] == len(corpus) == stats["with_image"]
    assert stats["codes"] == 64 * len(corpus) and stats["shards"] == -(-len(corpus) // 200)


def test_neighbors_are_documents_of_the_memory(built, tiny_run, capsys):
    memory = tiny_run.workdir / "memory"
    assert main.main(["corpus", "neighbors", str(built), f"--memory={memory}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    corpus = corpus_reader.TokenCorpus(built)
    rows = neighbor_rows.NeighborRows(pathlib.Path(found["path"]), corpus).take(
        np.arange(len(corpus))
    )
    assert rows.shape == (len(corpus), 2, 2)
    assert rows.min() >= 0 and rows.max() < found["memory_documents"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["build", "--tokenizer=nowhere", "--out=x"], "is not a run with an image tokenizer"),
        (["build", "--tokenizer=RUN", "--out=x", "--shard-size=0"], "give at least 1"),
        (["build", "--tokenizer=RUN", "--out=BUILT", "--max-bad=2"], "max"),
        (["neighbors", "nowhere", "--memory=RUN/memory"], "nowhere"),
        (["stats", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_one_sentence(words, says, built, tiny_run, capsys):
    places = {"RUN": str(tiny_run.workdir), "BUILT": str(built)}
    if words[0] == "build":
        words = [*words, f"--documents={SCENES}"]
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert main.main(["corpus", *words]) != 0
    said = capsys.readouterr().err.strip()
    assert says in said and "Traceback" not in said and len(said.splitlines()) == 1
