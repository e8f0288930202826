"""A stranger's memory: every value of its manifest and of its lists is checked before it is used."""

import json

import numpy as np
import pytest

from rag_mm.core import files
from rag_mm.core.document_types import Document, Text
from rag_mm.core.errors import UserError
from rag_mm.memory.retrieval_memory import Memory
from rag_mm.memory.store import manifest
from rag_mm.memory.writing.writer import Options


@pytest.fixture
def memory(tmp_path, encoder):
    documents = [Document(str(i), (Text(f"text {i}"),)) for i in range(5)]
    Memory.build(tmp_path / "m", documents, encoder, options=Options(index="exact"))
    return tmp_path / "m"


def put(memory, path, value):
    """Puts a value into the manifest and makes all digests right, as its author can."""
    file = memory / "v000001" / "manifest.json"
    fields = json.loads(file.read_text())
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(fields))
    sha256 = files.file_digest(file)
    file.with_suffix(".sha256").write_text(f"{sha256}  manifest.json\n")
    manifest.switch(memory, 1, sha256)


SHARD = ("shards", 0)
NUMBERS = (0, -1, 10**9, 2**63, 1.5, "5", None, [], True)
CASES = [((*SHARD, "rows"), value) for value in NUMBERS]
CASES += [(("dim",), value) for value in NUMBERS]
CASES += [(("version",), value) for value in NUMBERS if value is not True]
CASES += [((*SHARD, "with_text"), value) for value in (-1, 6, "5", None)]
CASES += [((*SHARD, "folder"), value) for value in ("..", "/tmp", "v1", None, 3, "v000001\n")]
CASES += [((*SHARD, "number"), value) for value in (-1, 10**9, None, "0")]
CASES += [(("removed",), value) for value in (-1, 6, 10**9, "1", None)]
CASES += [(("image_size",), value) for value in (0, 10**9, None)]
CASES += [(("num_codes",), value) for value in (0, -1, 10**12, "x")]
CASES += [(("indexed_by",), value) for value in ("../..", "/", None, 4)]
CASES += [((key,), value) for key in ("index", "encoder") for value in (None, 1, [])]
CASES += [(("files",), value) for value in (None, [], {}, {"a": 1}, {"../a": {}})]
CASES += [(("shards",), value) for value in (None, {}, [1], [{}])]
CASES += [(("files", "v000001/ids-00000.json", "size"), value) for value in (3, -1, "x", 2**62)]
CASES += [(("files", "v000001/ids-00000.json", "sha256"), value) for value in (None, "x", 5)]


@pytest.mark.parametrize(("path", "value"), CASES, ids=repr)
def test_a_manifest_of_a_stranger_is_refused_in_one_sentence(memory, path, value):
    put(memory, path, value)
    with pytest.raises(UserError) as caught:
        Memory.open(memory)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("data", [b"[" * 5000, b"{}", b"[1, 2, 3, 4, 5]", b'["0"]', bytes(100)])
def test_a_list_of_ids_is_checked(memory, data):
    (memory / "v000001" / "ids-00000.json").write_bytes(data)
    put(memory, ("files", "v000001/ids-00000.json", "size"), len(data))
    with pytest.raises(UserError, match=r"ids-00000|too small"):
        Memory.open(memory)


@pytest.mark.parametrize(
    ("key", "value"),
    [("url", [{}] * 5), ("caption", [None] * 5), ("image", "false"), ("license", []), ("more", [])],
)
def test_a_list_of_origins_is_checked(memory, key, value):
    path = memory / "v000001" / "origins-00000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    put(memory, ("files", "v000001/origins-00000.json", "size"), path.stat().st_size)
    with pytest.raises(UserError, match="does not hold 5 origins"):
        Memory.open(memory).remove(urls=["a"])


def test_rows_of_huge_numbers_are_refused(memory):
    path = memory / "v000001" / "embeddings-mixed-00000.npy"
    rows = np.load(path)
    rows[2] = 1e30
    np.save(path, rows)
    with pytest.raises(UserError, match=r"Row 2 holds NaN, infinity or more"):
        Memory.open(memory).search(vectors=np.eye(1, rows.shape[1], dtype=np.float32))


def test_there_is_a_last_version():
    assert manifest.folder_of(999_999) == "v999999"
    with pytest.raises(UserError, match="at most 999,999 versions"):
        manifest.folder_of(1_000_000)
