"""Documents of any source as pictures to caption."""

import numpy as np
import pytest

from rag_mm.core.document_types import Document, Image, Text
from rag_mm.core.errors import UserError
from rag_mm.data import captioned_documents, instruction_files
from rag_mm.memory.writing import stream


class Given:
    """A source of documents and bad records."""

    fingerprint = "given"

    def __init__(self, items):
        self.items, self.size = items, len(items)

    def read(self, start):
        for number, item in enumerate(self.items[start:], start + 1):
            kind = "reject" if isinstance(item, stream.Reject) else "document"
            yield stream.Item(number, **{kind: item})


PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def test_only_documents_with_a_picture_and_a_text_have_a_caption():
    image, reject = Image(PICTURE), stream.Reject("bad", "damaged", "it ends early")
    given = [
        Document("both", (Text("a cat"), image, Text("on a mat"))),
        Document("text", (Text("alone"),)),
        reject,
        Document("picture", (image,)),
        Document("blank", (Text(" "), image)),
    ]
    source = captioned_documents.CaptionedDocuments(Given(given))
    (item,) = source.read(2)
    assert item.id == "both" and item.answers == ("a cat on a mat",) and item.wants_text
    assert item.picture.shape == (2, 2, 3) and source.rejects == [reject]
    assert len(list(source.read(2))) == 1 and source.rejects == [reject]


def test_plain_sources_are_captions_alone(tmp_path):
    with pytest.raises(UserError, match="is not LAYOUT:PATH"):
        captioned_documents.open_items(f"{tmp_path}", ("question",))
    layout = captioned_documents.open_items(f"vqav2:{tmp_path}", ("caption",))
    assert isinstance(layout, instruction_files.InstructionFiles) and layout.task == "question"
    with pytest.raises(UserError):
        captioned_documents.open_items(f"{tmp_path / 'nothing'}", ("caption",))
