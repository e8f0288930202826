"""Every picture of a document has codes, of as many image tokenizers as a memory was given."""

import numpy as np
import pytest
from stand_in import StandInTokenizer, make_documents

from rag_mm.core.document_types import Document, Image, Text, Video
from rag_mm.core.errors import UserError
from rag_mm.memory import retrieval_memory
from rag_mm.memory.writing import stream, writer

SMALL = writer.Options(index="exact", batch_size=4, shard_size=3)


class Columns:
    """Another image tokenizer: the brightness of each column of pixels."""

    image_size, image_batch = 4, 2

    def __init__(self, fingerprint: str = "columns"):
        self.fingerprint = fingerprint
        self.num_encoded = 0

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.shape[1:] == (4, 4, 3)
        self.num_encoded += len(pixels)
        return pixels.mean(axis=(1, 3)).astype(np.int32)


def pixels(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.fixture
def documents():
    """Seven documents of any shape, with 14 pictures; the sixth has none."""
    clip = Video(pixels(3, 5, 20, 16), 8.0)
    return [
        *make_documents(2),
        Document(
            "story", (Image(pixels(0, 9, 9)), Text("then"), Image(pixels(1, 8, 8)), Text("end"))
        ),
        Document("clip", (Text("first words"), clip, Text("last"), Image(pixels(4, 8, 8)))),
        Document("frames", (Video(pixels(5, 3, 8, 8), 1.5),)),
        Document("text", (Text("only words"), Text("and more"))),
        *make_documents(1, 2),
    ]


@pytest.fixture
def built(tmp_path, documents, encoder, tokenizer):
    return retrieval_memory.Memory.build(
        tmp_path / "mem", documents, encoder, tokenizer, options=SMALL
    )


def test_a_build_stores_every_segment_and_encodes_every_picture(built, documents, tokenizer):
    assert built.verify() == []
    for row, document in enumerate(documents):
        stored = built.record(row)
        assert [type(s) for s in stored.document.segments] == [type(s) for s in document.segments]
        pictures = stored.document.pictures
        assert [picture.shape for picture in pictures] == [(8, 8, 3)] * len(document.pictures)
        codes = stored.picture_codes(tokenizer.fingerprint)
        if pictures:
            np.testing.assert_array_equal(codes, tokenizer.encode(np.stack(pictures)))
            np.testing.assert_array_equal(built.codes[row], codes[0])
        else:
            assert codes == []
            assert built.codes[row].tolist() == [-1] * 4
    clip = built.record(3)
    assert clip.document.segments[1].fps == 8.0
    assert clip.codes[tokenizer.fingerprint][1].shape == (5, 4)
    assert built.stats()["with_image"] == 6


def test_the_image_view_is_of_the_first_picture(built, encoder):
    frame = built.document(3).segments[1].frames[0]
    np.testing.assert_allclose(
        built.embeddings("image")[3], encoder.encode_image(frame[None])[0], atol=1e-6
    )
    found = built.search(document=built.document(3), view="image", k=1)
    assert found.ids.tolist() == [[3]]


def test_a_second_tokenizer_fills_the_same_records(built, tokenizer):
    columns = Columns()
    both = built.remove(ids=["doc-001"]).add_codes(columns)
    assert both.verify() == []
    assert columns.num_encoded == 13
    np.testing.assert_array_equal(both.codes, np.delete(built.codes, 1, axis=0))
    assert both.stats()["more_codes"] == {"columns": 4}
    read = both.code_reader("columns")
    rows = np.array([[0, 1], [4, 2]])
    firsts = [both.record(row).first_codes("columns") for row in (0, 1, 2)]
    np.testing.assert_array_equal(read(rows)[[0, 0, 1], [0, 1, 1]], firsts)
    assert read(rows)[1, 0].tolist() == [-1] * 4  # The document without a picture.
    for row in range(len(both)):
        stored = both.record(row)
        assert len(stored.picture_codes("columns")) == len(stored.document.pictures)
        assert len(stored.picture_codes(tokenizer.fingerprint)) == len(stored.document.pictures)
    assert both.code_reader("other") is built.code_reader("columns") is None


def test_documents_added_later_get_the_codes_when_they_are_filled_again(built, tokenizer):
    grown = built.add_codes(Columns()).add(make_documents(2, 20), tokenizer, options=SMALL)
    assert grown.verify() == []
    assert grown.code_reader("columns")(np.array([7])).tolist() == [[-1] * 4]
    with pytest.raises(UserError, match="has no codes of the image tokenizer columns"):
        grown.record(7).picture_codes("columns")
    columns = Columns()
    filled = grown.add_codes(columns)
    assert columns.num_encoded == 2
    assert (filled.code_reader("columns")(np.array([7, 8])) >= 0).all()


def test_a_merged_or_compacted_memory_keeps_all_codes(built, tmp_path, encoder, tokenizer):
    other = retrieval_memory.Memory.build(
        tmp_path / "other", make_documents(4, 30), encoder, tokenizer, options=SMALL
    ).add_codes(Columns())
    merged = built.merge(other).compact()
    assert merged.verify() == []
    read = merged.code_reader("columns")
    assert (read(np.arange(7)) == -1).all()
    np.testing.assert_array_equal(
        read(np.arange(7, 11)), other.code_reader("columns")(np.arange(4))
    )


def test_a_memory_without_a_tokenizer_of_its_own_takes_codes(tmp_path, documents, encoder):
    built = retrieval_memory.Memory.build(tmp_path / "mem", documents, encoder, options=SMALL)
    coded = built.add_codes(Columns()).add(make_documents(1, 20), options=SMALL)
    assert coded.codes is None
    assert (coded.code_reader("columns")(np.array([0, 3, 5]))[:, 0] >= 0).tolist() == [
        True,
        True,
        False,
    ]
    assert coded.verify() == []


def test_a_batch_ends_when_its_pictures_are_many(tmp_path, encoder, tokenizer):
    """A batch of long videos would not fit into memory."""
    counts = []

    class Counting(StandInTokenizer):
        def encode(self, pixels):
            counts.append(len(pixels))
            return super().encode(pixels)

    clips = [Document(f"{i}", (Video(pixels(i, 3, 8, 8), 1.0),)) for i in range(4)]
    retrieval_memory.Memory.build(
        tmp_path / "mem", clips, encoder, Counting(), options=writer.Options("exact", batch_size=4)
    )
    assert counts == [4, 2, 4, 2]  # Two videos at once, four frames at once.
    assert encoder.batches == [2, 2]


def test_a_build_is_not_resumed_with_other_further_pictures(documents):
    before = stream.DocumentSource(documents).fingerprint
    story = documents[2]
    changed = Document(story.id, (*story.segments[:2], Image(pixels(9, 8, 8)), Text("end")))
    documents[2] = changed
    assert stream.DocumentSource(documents).fingerprint != before
