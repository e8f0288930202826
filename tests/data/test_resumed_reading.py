"""Reading a source again from any item's position yields exactly the items that follow it."""

import tarfile

import hostile
import pytest

from rag_mm.core import document_types
from rag_mm.data import array_records, open_documents, sources, webdataset


def make_folder(hostile_folder, tmp_path):
    return sources.FolderSource(hostile_folder)


def make_tars(hostile_folder, tmp_path):
    """Three tar files of four samples, one of them without a caption."""
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for i in range(4):
                sample = hostile.encoded(hostile.pixels(i))
                hostile.sample(tar, f"{number}/{i}", sample, b"caption" if i != 2 else None)
    return webdataset.TarSource(sorted(tmp_path.glob("*.tar")))


def make_array_records(hostile_folder, tmp_path):
    documents = [
        document_types.Document(
            f"d{i}", (document_types.Text(f"word {i}"), document_types.Image(hostile.pixels(i)))
        )
        for i in range(4)
    ]
    array_records.write_documents(tmp_path / "some.arrayrecord", documents)
    return open_documents.open_documents(str(tmp_path / "some.arrayrecord"))


def name(item) -> str:
    return item.document.id if item.document else item.reject.name


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("make", [make_folder, make_tars, make_array_records])
def test_reading_resumes_from_any_position(hostile_folder, tmp_path, make):
    source = make(hostile_folder, tmp_path)
    items = list(source.read(0))
    for place, item in enumerate(items):
        rest = list(source.read(item.position))
        assert [i.position for i in rest] == [i.position for i in items[place + 1 :]]
        assert [name(i) for i in rest] == [name(i) for i in items[place + 1 :]]
