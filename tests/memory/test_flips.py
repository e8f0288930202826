"""Bytes that change on a disk, anywhere in a memory that has lived: each is named, none crashes."""

import pathlib

import numpy as np
import pytest
from stand_in import StandInEncoder, make_documents

from rag_mm.core.errors import UserError
from rag_mm.memory import retrieval_memory
from rag_mm.memory.index import scann
from rag_mm.memory.store import verify
from rag_mm.memory.writing import writer


def lived(root: pathlib.Path) -> pathlib.Path:
    """Built with bad records, added to, with tombstones and a tree; carried weights."""
    (root / "weights").mkdir()
    (root / "weights" / "config.json").write_text("{}")
    config = scann.ScannConfig(scoring="tree", num_leaves=4, leaves_to_search=4, soar_lambda=1.5)
    options = writer.Options(batch_size=16, shard_size=32, scann=config, max_bad=0.5)
    documents = [*make_documents(40), *make_documents(2)]
    built = retrieval_memory.Memory.build(
        root / "mem",
        documents,
        StandInEncoder(),
        carried={"retriever": root / "weights"},
        options=options,
    )
    built = built.add(make_documents(10, 40), options=options)
    built.remove([f"doc-{i:03d}" for i in range(0, 20, 3)])
    assert verify.verify(root / "mem") == []
    return root / "mem"


def check_flips(mem: pathlib.Path, names: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = StandInEncoder().encode_text(["thing number3"])
    for name in names:
        data = (mem / name).read_bytes()
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (mem / name).write_bytes(changed)
        problems = verify.verify(mem)
        assert any(pathlib.Path(name).name in problem for problem in problems), (name, problems)
        try:
            opened = retrieval_memory.Memory.open(mem)
            for view in ("image", "text", "mixed"):
                opened.search(vectors=vectors, view=view)
            opened.document(3)
            opened.stats()
        except UserError:
            pass
        (mem / name).write_bytes(data)
    assert verify.verify(mem) == []


def names_of(mem: pathlib.Path) -> list[str]:
    found = [p.relative_to(mem).as_posix() for p in mem.rglob("*") if p.is_file()]
    return sorted(set(found) - {".memory-lock"})


def test_a_flip_in_each_kind_of_file_that_removals_and_rejects_add(tmp_path):
    mem = lived(tmp_path)
    names = [n for n in names_of(mem) if not n.startswith("v000001/index") or "text/" in n]
    new = ("removed", "rejects", "ingest", "begun", "commit-00000", "origins-00000", "index-text/")
    chosen = [n for n in names if any(word in n for word in new)]
    assert len(chosen) >= 20
    check_flips(mem, chosen, seed=0)


@pytest.mark.slow
def test_two_hundred_flips_anywhere(tmp_path):
    mem = lived(tmp_path)
    names = names_of(mem)
    chosen = np.random.default_rng(1).choice(names, 200).tolist()
    check_flips(mem, chosen, seed=2)
