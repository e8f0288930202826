"""From every tar of a table come the documents and the rejects that its rule says, and nothing else."""

import pytest
import tar_cases

from rag_mm.data import webdataset

CASES = tar_cases.cases()


def test_there_are_enough_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_a_tar_gives_its_documents_and_rejects(tmp_path, name):
    case = CASES[name]
    for file_name, data in case.files.items():
        (tmp_path / file_name).write_bytes(data)
    items = list(webdataset.TarSource(sorted(tmp_path.iterdir())).read(0))
    documents = tuple((i.document.id, i.document.text) for i in items if i.document)
    rejects = tuple((i.reject.name, i.reject.reason) for i in items if i.reject)
    assert (documents, rejects) == (case.documents, case.rejects)
    assert len(documents) + len(rejects) == len(items)
