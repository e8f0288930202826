"""`open_documents` refuses a spec that names no documents, and says why."""

import hostile
import pytest

from rag_mm.core.errors import UserError
from rag_mm.data import open_documents

PNG = hostile.encoded(hostile.pixels())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{folder}/no", "is not a folder"),
        ("{folder}/empty", r"captions\.jsonl"),
        ("{folder}/page.html", "is neither a tar, an ArrayRecord nor a Parquet file"),
        ("{folder}/a.tar.gz", "is compressed, which is not read; decompress it to a .tar"),
        ("{folder}/A.TGZ", "is compressed"),
        ("{folder}/packed", r"a\.tar\.zst is compressed"),
        ("tfds:nothing", "has no split"),
        ("tfds:no_such_dataset:train", "TFDS cannot read"),
    ],
)
def test_a_spec_that_names_no_documents_is_refused(tmp_path, spec, message):
    for name in ("empty", "packed"):
        (tmp_path / name).mkdir()
    for name in ("page.html", "a.tar.gz", "A.TGZ", "packed/a.tar.zst"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        open_documents.open_documents(spec.format(folder=tmp_path))


def ids_of(spec):
    return [item.document.id for item in open_documents.open_documents(str(spec)).read(0)]


def test_endings_are_read_in_any_case_and_shadows_are_not(tmp_path, make_tar):
    """As a Mac leaves them: `._B.TAR` beside `B.TAR`; samples of both tars are called 0."""
    make_tar(tmp_path, lambda tar: hostile.sample(tar, "0", PNG, b"caption"))
    (tmp_path / "B.TAR").write_bytes((tmp_path / "a.tar").read_bytes())
    (tmp_path / "._B.TAR").write_bytes(b"no tar")
    assert ids_of(tmp_path / "B.TAR") == ["0"]
    assert ids_of(tmp_path) == ["B/0", "a/0"]
