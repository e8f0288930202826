"""A build that resumes a killed one: the same bytes from the same documents, nothing from other documents."""

import killed_writers
from killed_writers import ids
from stand_in import StandInEncoder, make_documents

from rag_mm.memory import retrieval_memory


def test_a_resumed_build_has_the_bytes_of_an_uninterrupted_one(tmp_path, encoder):
    path = tmp_path / "mem"
    killed_writers.ACTIONS["build"](path, encoder)
    whole = {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    for marker in (path / "v000001" / "commit-00002.json", path / "CURRENT"):
        marker.unlink()
    killed_writers.ACTIONS["build"](path, StandInEncoder())
    assert {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()} == whole


def test_other_documents_are_not_mixed_with_those_of_a_killed_build(tmp_path, encoder):
    path = tmp_path / "mem"
    killed_writers.ACTIONS["build"](path, encoder)
    (path / "CURRENT").unlink()
    built = retrieval_memory.Memory.build(
        path, make_documents(15, 1), StandInEncoder(), options=killed_writers.OPTIONS
    )
    assert built.ids == tuple(ids(16, 1))
    assert built.verify() == []
