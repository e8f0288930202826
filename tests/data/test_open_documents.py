"""`open_documents` refuses a spec that names no documents, and says why."""

import pytest

from rag_mm.core.errors import UserError
from rag_mm.data import open_documents


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{folder}/no", "is not a folder"),
        ("{folder}", r"captions\.jsonl"),
        ("tfds:nothing", "has no split"),
        ("tfds:no_such_dataset:train", "TFDS cannot read"),
    ],
)
def test_a_spec_that_names_no_documents_is_refused(tmp_path, spec, message):
    with pytest.raises(UserError, match=message):
        open_documents.open_documents(spec.format(folder=tmp_path))
