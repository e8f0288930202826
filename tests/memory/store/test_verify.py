"""Whatever happens to a memory's files is named, by `open` where it is cheap and by `verify` always."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from stand_in import StandInEncoder, StandInTokenizer, make_documents

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.memory import retrieval_memory
from rag_mm.memory.index import scann
from rag_mm.memory.store import manifest, verify
from rag_mm.memory.writing import writer


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Two versions, hashed indexes, carried weights, and the two files of a run's stage."""
    root = tmp_path_factory.mktemp("verify")
    (root / "weights").mkdir()
    (root / "weights" / "config.json").write_text("{}")
    options = writer.Options(
        batch_size=16, shard_size=32, scann=scann.ScannConfig(scoring="hashed")
    )
    built = retrieval_memory.Memory.build(
        root / "mem",
        make_documents(40),
        StandInEncoder(),
        StandInTokenizer(),
        carried={"retriever": root / "weights"},
        options=options,
    )
    built.add(make_documents(10, 40), StandInTokenizer())
    (root / "mem" / "manifest.json").write_text("{}")
    (root / "mem" / "times.json").write_text("{}")
    assert verify.verify(root / "mem") == []
    return root / "mem"


@pytest.fixture
def copy(original, tmp_path):
    return pathlib.Path(shutil.copytree(original, tmp_path / "mem"))


def paths_of(root: pathlib.Path) -> list[str]:
    """Every file but the lock, which is empty, and those that belong to a run."""
    found = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return sorted(set(found) - {".memory-lock", "manifest.json", "times.json"})


def test_a_flipped_byte_in_any_file_is_named_and_crashes_no_search(original, tmp_path):
    rng = np.random.default_rng(0)
    names = paths_of(original)
    assert len(names) > 40
    copy = pathlib.Path(shutil.copytree(original, tmp_path / "mem"))
    vectors = StandInEncoder().encode_text(["thing number3"])
    for name in names:
        path = copy / name
        data = path.read_bytes()
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(changed)
        problems = verify.verify(copy)
        assert problems, name
        assert any(pathlib.Path(name).name in problem for problem in problems), (name, problems)
        try:
            opened = retrieval_memory.Memory.open(copy)
            for view in ("image", "text", "mixed"):
                opened.search(vectors=vectors, view=view)
            opened.document(3)
        except UserError:
            pass
        path.write_bytes(data)
    assert verify.verify(copy) == []


def test_a_missing_or_truncated_file_is_named_on_open(original, copy):
    _, current = manifest.read_current(copy)
    needed = set(manifest.read(copy, 2, current).files) | {
        "CURRENT", "v000002/manifest.json", "v000002/manifest.sha256",
    }  # fmt: skip
    for name in sorted(needed):
        (copy / name).write_bytes((original / name).read_bytes()[:-1])
        with pytest.raises(UserError, match=pathlib.Path(name).stem):
            retrieval_memory.Memory.open(copy)
        (copy / name).unlink()
        if name != "CURRENT":
            with pytest.raises(UserError, match=pathlib.Path(name).stem):
                retrieval_memory.Memory.open(copy)
        assert verify.verify(copy), name
        shutil.copyfile(original / name, copy / name)
    retrieval_memory.Memory.open(copy)


def test_files_that_belong_to_nothing_are_named(copy):
    (copy / "v000001" / "index-text" / "scann_docids.pkl").write_bytes(b"")
    (copy / "notes.txt").write_text("mine")
    problems = verify.verify(copy)
    assert len(problems) == 2
    assert "notes.txt" in problems[0]
    assert "scann_docids.pkl" in problems[1]
    (copy / "manifest.json").write_text("{")
    assert len(verify.verify(copy)) == 3


def test_an_older_current_is_not_a_newer_one(copy):
    """CURRENT carries the digest of its manifest, so it cannot be pointed elsewhere by a flip."""
    line = (copy / "CURRENT").read_text()
    (copy / "CURRENT").write_text(line.replace("v000002", "v000001"))
    with pytest.raises(UserError, match="was changed"):
        retrieval_memory.Memory.open(copy)


def test_folders_that_are_no_memories(tmp_path):
    with pytest.raises(
        UserError, match="is not a memory, since it has no CURRENT: name a folder made by"
    ):
        retrieval_memory.Memory.open(tmp_path)
    with pytest.raises(UserError, match="is not a memory"):
        verify.verify(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        verify.verify(tmp_path / "nothing")


def test_a_manifest_that_leads_outside_is_refused(copy):
    path = copy / "v000002" / "manifest.json"
    fields = json.loads(path.read_text())
    for name in ("../../secret", "/etc/passwd"):
        reseal(copy, fields | {"files": {name: {"size": 1, "sha256": "0"}}})
        with pytest.raises(UserError, match="leads outside"):
            retrieval_memory.Memory.open(copy)
    reseal(copy, {"format": 1})
    with pytest.raises(UserError, match="not a manifest of this version"):
        retrieval_memory.Memory.open(copy)


def test_rows_that_are_wrong_although_every_digest_is_right(copy):
    """What a builder with a mistake in it would leave."""
    name = "v000001/embeddings-text-00000.npy"
    rows = np.load(copy / name)
    rows[3] *= 2
    assert any("row 3 and 0 more do not have unit length" in p for p in with_file(copy, name, rows))
    rows[3] = np.nan
    problems = with_file(copy, name, rows)
    assert any("row 3 and 0 more hold NaN" in p for p in problems)
    with pytest.raises(UserError, match="Row 3 holds NaN"):
        retrieval_memory.Memory.open(copy).search(
            vectors=np.zeros((1, StandInEncoder.dim), np.float32), view="text"
        )


def test_ids_that_repeat_or_are_too_few(copy):
    name = "v000001/ids-00000.json"
    ids = json.loads((copy / name).read_text())
    problems = with_file(copy, name, [ids[1], *ids[1:]])
    assert any("'doc-001' occurs in 2 rows" in p for p in problems)
    assert any("Row 0: the record does not match" in p for p in problems)
    assert any("does not hold 32 ids" in p for p in with_file(copy, name, ids[1:]))


def test_codes_that_are_not_the_records(copy):
    name = "v000001/codes-00001.npy"
    problems = with_file(copy, name, np.load(copy / name) + np.int32(1))
    assert any("Row 32: the record does not match its codes" in p for p in problems)


def test_records_and_rows_that_differ_in_number(copy):
    name, other = "v000001/records-00000.arrayrecord", "v000001/records-00001.arrayrecord"
    problems = with_file(copy, name, (copy / other).read_bytes())
    assert any("holds 8 records instead of 32" in p for p in problems)


def test_an_index_that_finds_the_wrong_rows(copy, original):
    """The codes of another view: native files in order, answers wrong."""
    rows = np.load(original / "v000001" / "embeddings-text-00000.npy")
    wrong = scann.ScannIndex(scann.ScannConfig(scoring="hashed"))
    wrong.build(np.concatenate([rows[::-1], rows[:18]]))
    wrong.save(copy / "v000002" / "index-text")
    for path in (copy / "v000002" / "index-text").iterdir():
        problems = with_file(copy, path.relative_to(copy).as_posix(), path.read_bytes())
    assert any("View text: recall@10 against exact search is" in p for p in problems)


def with_file(root: pathlib.Path, name: str, content) -> list[str]:
    """Replaces a file, brings the manifests in line with it, and verifies."""
    if isinstance(content, np.ndarray):
        np.save(root / name, content)
    elif isinstance(content, bytes):
        (root / name).write_bytes(content)
    else:
        (root / name).write_text(json.dumps(content))
    for version in (1, 2):
        path = root / manifest.folder_of(version) / "manifest.json"
        fields = json.loads(path.read_text())
        if name in fields["files"]:
            entry = manifest.seal(root / name)
            fields["files"][name] = {"size": entry.size, "sha256": entry.sha256}
        reseal(root, fields)
    return verify.verify(root)


def reseal(root: pathlib.Path, fields: dict) -> None:
    folder = root / manifest.folder_of(fields.get("version", 2))
    text = json.dumps(fields)
    sha256 = files.digest(text.encode())
    (folder / "manifest.json").write_text(text)
    (folder / "manifest.sha256").write_text(f"{sha256}  manifest.json\n")
    if fields.get("version", 2) == 2:
        manifest.switch(root, 2, sha256)
