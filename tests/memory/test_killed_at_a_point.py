"""A writer killed at a named point leaves the old version or the new one, and rerunning it completes it."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterable, Iterator

import killed_writers
import pytest
from killed_writers import ids
from stand_in import StandInEncoder, make_documents

from rag_mm.core.errors import UserError
from rag_mm.memory import retrieval_memory
from rag_mm.memory.store import verify

OLD = {"add": ids(15), "compact": sorted(set(ids(15)) - set(killed_writers.REMOVED))}
NEW = {"build": ids(15), "add": ids(30), "compact": OLD["compact"]}
BEFORE_SWITCH = [point for point in killed_writers.POINTS if point != "after the switch"]


def rerun(folder, tmp_path, action, point):
    """Repeats the killed action on a copy: (the memory's path, the encoder, which lists its batches)."""
    path, encoder = tmp_path / "mem", StandInEncoder()
    shutil.copytree(folder / f"{action} {point}", path)
    killed_writers.ACTIONS[action](path, encoder)
    return path, encoder


@pytest.mark.parametrize("point", BEFORE_SWITCH)
def test_a_killed_build_is_reported_as_unfinished(killed_at_points, point):
    with pytest.raises(UserError, match="was not finished"):
        retrieval_memory.Memory.open(killed_at_points / f"build {point}")


@pytest.mark.parametrize("point", BEFORE_SWITCH)
@pytest.mark.parametrize("action", ["add", "compact"])
def test_the_old_version_is_whole_before_the_switch(killed_at_points, action, point):
    path = killed_at_points / f"{action} {point}"
    assert verify.verify(path) == []
    assert list(retrieval_memory.Memory.open(path).ids) == OLD[action]


@pytest.mark.parametrize("action", killed_writers.ACTIONS)
def test_the_new_version_is_whole_after_the_switch(killed_at_points, action):
    path = killed_at_points / f"{action} after the switch"
    assert verify.verify(path) == []
    assert list(retrieval_memory.Memory.open(path).ids) == NEW[action]


@pytest.mark.parametrize("point", BEFORE_SWITCH)
@pytest.mark.parametrize("action", killed_writers.ACTIONS)
def test_a_rerun_completes_the_new_version(killed_at_points, tmp_path, action, point):
    path, _ = rerun(killed_at_points, tmp_path, action, point)
    assert verify.verify(path) == []
    assert list(retrieval_memory.Memory.open(path).ids) == NEW[action]


@pytest.mark.parametrize("point", BEFORE_SWITCH)
@pytest.mark.parametrize("action", killed_writers.ACTIONS)
def test_a_rerun_encodes_no_committed_shard_again(killed_at_points, tmp_path, action, point):
    """A build or an addition has three shards of two batches, each of texts and of images."""
    batches = {"shard written": 10, "shard committed": 6, "index saved": 0, "before the switch": 0}
    _, encoder = rerun(killed_at_points, tmp_path, action, point)
    assert len(encoder.batches) == (batches[point] if action != "compact" else 0)


def flipped(data: bytes, places: Iterable[int]) -> Iterator[bytes]:
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1
        yield bytes(changed)


@pytest.mark.parametrize("action", killed_writers.ACTIONS)
def test_a_damaged_commit_marker_loses_no_row(killed_at_points, tmp_path, action):
    """Every digit of its numbers changed, another key, cut off, and one of an older writer."""
    source = killed_at_points / f"{action} before the switch"
    marker = max(source.glob("v*/commit-00000.json")).relative_to(source)
    data = (source / marker).read_bytes()
    number = [m.start() for m in re.finditer(rb"(?<=: )\d", data)]
    damaged = [*flipped(data, [*number, data.index(b"position")]), data[:-20], b"[]", b"{}"]
    damaged.append(json.dumps(json.loads(data)["commit"]).encode())
    for i, content in enumerate(damaged):
        path = tmp_path / str(i)
        shutil.copytree(source, path)
        (path / marker).write_bytes(content)
        killed_writers.ACTIONS[action](path, StandInEncoder())
        assert verify.verify(path) == []
        assert list(retrieval_memory.Memory.open(path).ids) == NEW[action]


def test_a_marker_of_another_plan_is_not_taken(killed_at_points, tmp_path):
    path = tmp_path / "mem"
    shutil.copytree(killed_at_points / "build before the switch", path)
    begun = path / "v000001" / "begun.json"
    options = dataclasses.replace(killed_writers.OPTIONS, shard_size=4)
    begun.write_text(begun.read_text().replace('"shard_size": 6', '"shard_size": 4'))
    retrieval_memory.Memory.build(path, make_documents(15), StandInEncoder(), options=options)
    assert verify.verify(path) == []
    assert len(list(path.glob("v000001/records-*"))) == 4
