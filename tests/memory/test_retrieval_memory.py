"""A memory's life: build, search, add beside readers, and failures that leave nothing behind."""

import dataclasses
import os
import pathlib
import signal

import fresh_python
import numpy as np
import PIL.Image
import pytest
from stand_in import StandInEncoder, StandInTokenizer, make_documents

from rag_mm.core.document_types import Document, Image, Text
from rag_mm.core.errors import UserError
from rag_mm.memory import model_protocols, retrieval_memory
from rag_mm.memory.index import scann
from rag_mm.memory.store import verify
from rag_mm.memory.writing import writer

PROGRAMS = pathlib.Path(__file__).parent / "programs"
SMALL = writer.Options(index="exact", batch_size=4, shard_size=6)


@pytest.fixture
def weights(tmp_path):
    (tmp_path / "weights" / "params").mkdir(parents=True)
    (tmp_path / "weights" / "config.json").write_text("{}")
    (tmp_path / "weights" / "params" / "0").write_bytes(b"numbers")
    return tmp_path / "weights"


@pytest.fixture
def built(tmp_path, encoder, tokenizer, weights):
    return retrieval_memory.Memory.build(
        tmp_path / "mem",
        make_documents(15),
        encoder,
        tokenizer,
        carried={"retriever": weights},
        options=SMALL,
    )


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_build_stores_documents_embeddings_and_codes(built, encoder, tokenizer):
    documents = make_documents(15)
    assert len(built) == 15
    assert built.ids == tuple(document.id for document in documents)
    for row in (0, 5, 6, 14):  # The first and last of shards.
        found = built.document(row)
        assert (found.id, found.text, found.url, found.license) == (
            documents[row].id, documents[row].text, documents[row].url, "CC0",
        )  # fmt: skip
        np.testing.assert_array_equal(found.image, documents[row].image)
    pictures = np.stack([document.image for document in documents])
    np.testing.assert_array_equal(built.codes, tokenizer.encode(pictures))
    image = encoder.encode_image(pictures)
    text = encoder.encode_text([document.text for document in documents])
    np.testing.assert_allclose(built.embeddings("image"), image, atol=1e-6)
    mixed = (image + text) / np.linalg.norm(image + text, axis=1, keepdims=True)
    np.testing.assert_allclose(built.embeddings("mixed"), mixed, atol=1e-6)
    record = built.record(7)
    np.testing.assert_array_equal(record.codes[tokenizer.fingerprint][1], built.codes[7])
    np.testing.assert_array_equal(record.embeddings["text"], built.embeddings("text")[7])
    assert built.verify() == []
    assert built.stats()["rows"] == built.stats()["with_image"] == 15
    assert built.stats()["shards"] == 3


def test_each_text_and_image_is_encoded_once_and_a_query_alone(tmp_path, encoder):
    root = tmp_path / "mem"
    built = retrieval_memory.Memory.build(root, make_documents(15), encoder, options=SMALL)
    assert sum(encoder.batches) == 2 * 15 and max(encoder.batches) == SMALL.batch_size
    encoder.batches.clear()
    built.search(text="thing number3", k=1)
    built.search(image=make_documents(1)[0].image, k=1)
    built.add(make_documents(1, 20), options=SMALL)
    assert encoder.batches == [1, 1, 1, 1]


def test_search_by_text_image_and_vectors(built):
    document = built.document(9)
    assert built.search(text=document.text, view="text", k=1).ids[0, 0] == 9
    assert built.search(image=document.image, k=1).ids[0, 0] == 9
    assert built.search(text=[document.text, built.document(2).text]).ids[:, 0].tolist() == [9, 2]
    found = built.search(vectors=built.embeddings("mixed")[3:5], k=2)
    assert found.ids[:, 0].tolist() == [3, 4]
    np.testing.assert_allclose(found.scores[:, 0], 1, atol=1e-5)
    enlarged = document.image.repeat(4, axis=0).repeat(4, axis=1)
    assert built.search(image=enlarged, k=1).ids[0, 0] == 9
    assert (built.search(text="anything", k=20).ids[0, 15:] == -1).all()


def test_a_text_is_found_whatever_file_it_came_from(tmp_path, encoder):
    """The stand-in's embedding of a word with a byte-order mark is another word's."""
    raw = Document("raw", (Text("\ufeffmany\r\ntiles \n"),))
    memory = retrieval_memory.Memory.build(tmp_path / "mem", [raw], encoder, options=SMALL)
    assert memory.document(0).text == "many tiles"
    for query in ("many tiles", " many tiles\n", "\ufeffmany tiles"):
        assert memory.search(text=query, k=1).scores[0, 0] == pytest.approx(1)


def test_an_image_is_found_in_every_form(built):
    pixels = built.document(3).image
    for image in (pixels, pixels / 255, PIL.Image.fromarray(pixels), pixels[None], [pixels]):
        assert built.search(image=image, k=1).ids.tolist() == [[3]]
    assert built.search(image=[pixels, pixels / 255], k=1).ids.tolist() == [[3], [3]]
    with pytest.raises(UserError, match="is a path"):
        built.search(image="a.png")


def test_search_refuses_what_it_cannot_answer(built):
    with pytest.raises(UserError, match="exactly one"):
        built.search(text="a", vectors=np.zeros((1, 24), np.float32))
    with pytest.raises(UserError, match="exactly one"):
        built.search()
    with pytest.raises(UserError, match="no view 'sound'"):
        built.search(text="a", view="sound")
    with pytest.raises(UserError, match="k = 0"):
        built.search(text="a", k=0)
    with pytest.raises(UserError, match="5 wide but the index is 24"):
        built.search(vectors=np.zeros((1, 5), np.float32))
    with pytest.raises(UserError, match="Row 15 is not in a memory of 15"):
        built.document(15)
    bare = retrieval_memory.Memory.open(built.path)
    assert bare.search(vectors=built.embeddings("text")[:1], view="text", k=1).ids[0, 0] == 0
    with pytest.raises(UserError, match="without its retriever"):
        bare.search(text="a")
    with pytest.raises(UserError, match="another retriever"):
        retrieval_memory.Memory.open(built.path, StandInEncoder("another"))


def test_a_document_with_one_part_has_it_in_every_view(tmp_path, encoder, tokenizer):
    picture = make_documents(1)[0].image
    documents = [
        Document("text", (Text("only words"),)),
        Document("image", (Image(picture),)),
    ]
    built = retrieval_memory.Memory.build(
        tmp_path / "mem", documents, encoder, tokenizer, options=dataclasses.replace(SMALL)
    )
    for row in (0, 1):
        rows = [built.embeddings(view)[row] for view in model_protocols.VIEWS]
        np.testing.assert_allclose(rows, [rows[0]] * 3, atol=1e-6)
    np.testing.assert_array_equal(built.codes[0], -1)
    assert built.record(0).codes == {}
    assert (built.stats()["with_text"], built.stats()["with_image"]) == (1, 1)
    assert built.verify() == []
    words = retrieval_memory.Memory.build(
        tmp_path / "words", documents[:1], encoder, tokenizer, options=SMALL
    )
    assert words.codes is None
    grown = words.add(documents[1:], tokenizer)
    assert grown.codes.tolist()[0] == [-1] * 4
    assert grown.verify() == []


def test_pictures_are_fitted_to_the_models_size(tmp_path, encoder):
    built = retrieval_memory.Memory.build(
        tmp_path / "mem", make_documents(2, size=13), encoder, options=SMALL
    )
    assert built.document(0).image.shape == (8, 8, 3)
    assert built.codes is None


def test_carried_weights_are_checked_before_they_are_handed_out(built, weights):
    folder = built.carried("retriever")
    assert files_of(folder) == files_of(weights)
    with pytest.raises(UserError, match="carries no tokenizer"):
        built.carried("tokenizer")
    (folder / "params" / "0").write_bytes(b"Numbers")
    with pytest.raises(UserError, match="params/0 was changed"):
        built.carried("retriever")


def test_same_documents_same_bytes(tmp_path, encoder, tokenizer):
    folders = []
    for name in ("one", "two"):
        built = retrieval_memory.Memory.build(
            tmp_path / name, make_documents(9), encoder, tokenizer, options=SMALL
        )
        folders.append((files_of(tmp_path / name), built.fingerprint))
    assert folders[0] == folders[1]
    other = retrieval_memory.Memory.build(
        tmp_path / "three", make_documents(9, 1), encoder, tokenizer
    )
    assert other.fingerprint != folders[0][1]


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_add_makes_a_new_version_and_readers_keep_the_old_one(tmp_path, encoder, tokenizer, kind):
    options = dataclasses.replace(SMALL, index=kind)
    first = retrieval_memory.Memory.build(
        tmp_path / "mem", make_documents(10), encoder, tokenizer, options=options
    )
    before = files_of(first.path)
    second = first.add(make_documents(5, 10), tokenizer, options=options)
    after = files_of(first.path)
    del before["CURRENT"]
    assert before.items() <= after.items()  # Nothing that a reader uses was touched.
    new = {name for name in after if name.startswith("v000002/")}
    assert not any("00000.arrayrecord" in name and "v000002" not in name for name in new)
    assert (len(first), len(second)) == (10, 15)
    text = make_documents(1, 12)[0].text
    assert second.search(text=text, view="text", k=1).ids[0, 0] == 12
    assert first.search(text=text, view="text", k=15).ids.max() == 9
    assert second.document(12).id == "doc-012"
    np.testing.assert_array_equal(second.codes[:10], first.codes)
    whole = retrieval_memory.Memory.build(
        tmp_path / "whole", make_documents(15), encoder, tokenizer, options=options
    )
    for view in model_protocols.VIEWS:
        np.testing.assert_array_equal(second.embeddings(view), whole.embeddings(view))
    assert second.verify() == []
    again = retrieval_memory.Memory.open(first.path, encoder, version=1)
    np.testing.assert_array_equal(again.search(text=text).ids, first.search(text=text).ids)
    for missing in (3, -1):
        with pytest.raises(UserError, match=f"no version {missing}; its newest is 2"):
            retrieval_memory.Memory.open(first.path, version=missing)
    third = first.add(make_documents(1, 20), tokenizer)  # An old reader adds to the newest.
    assert (len(third), third.stats()["version"]) == (16, 3)
    assert third.verify() == []


def test_a_hashed_index_is_kept_and_stays_hashed(tmp_path, encoder):
    options = writer.Options(scann=scann.ScannConfig(scoring="hashed"))
    built = retrieval_memory.Memory.build(
        tmp_path / "mem", make_documents(60), encoder, options=options
    )
    opened = retrieval_memory.Memory.open(tmp_path / "mem", encoder)
    vectors = built.embeddings("mixed")[:8]
    np.testing.assert_array_equal(
        opened.search(vectors=vectors).ids, built.search(vectors=vectors).ids
    )
    grown = opened.add(make_documents(5, 60))
    assert (grown.path / "v000002" / "index-mixed" / "ah_codebook.pb").exists()
    assert grown.verify() == []


def test_add_refuses_other_makers_and_known_ids_and_changes_nothing(built, encoder, tokenizer):
    before = files_of(built.path)
    built._encoder = StandInEncoder("another")
    with pytest.raises(UserError, match="another retriever"):
        built.add(make_documents(1, 20), tokenizer)
    built._encoder = encoder
    with pytest.raises(UserError, match="codes of tokenizer stand-in codes, but None"):
        built.add(make_documents(1, 20))
    with pytest.raises(UserError, match="codes of tokenizer stand-in codes, but other"):
        built.add(make_documents(1, 20), StandInTokenizer("other"))
    with pytest.raises(UserError, match="no documents"):
        built.add([], tokenizer)
    with pytest.raises(UserError, match="Two documents have the id 'doc-003'"):
        built.add([*make_documents(5, 20), *make_documents(1, 3)], tokenizer)
    assert files_of(built.path) == before


class BrokenEncoder(StandInEncoder):
    def encode_image(self, pixels):
        rows = super().encode_image(pixels)
        rows[-1] = np.nan
        return rows


@pytest.mark.parametrize(
    ("documents", "encoder", "complaint"),
    [
        ([], StandInEncoder(), "no documents"),
        (make_documents(3) + make_documents(1), StandInEncoder(), "id 'doc-000'"),
        ([Document("", (Text("a"),))], StandInEncoder(), "empty id"),
        ([Document("x", (Text(" "),))], StandInEncoder(), "'x' has neither"),
        (make_documents(4), BrokenEncoder(), "'doc-003' is zero, NaN"),
    ],
)
def test_a_build_that_fails_leaves_nothing(tmp_path, documents, encoder, complaint):
    with pytest.raises(UserError, match=complaint):
        retrieval_memory.Memory.build(tmp_path / "mem", documents, encoder, options=SMALL)
    assert not (tmp_path / "mem").exists()
    (tmp_path / "mem").mkdir()
    (tmp_path / "mem" / "manifest.json").write_text("{}")  # A run's stage stands there first.
    with pytest.raises(UserError, match=complaint):
        retrieval_memory.Memory.build(tmp_path / "mem", documents, encoder, options=SMALL)
    assert os.listdir(tmp_path / "mem") == ["manifest.json"]


def test_build_touches_nothing_of_others(built, encoder, weights, tmp_path):
    with pytest.raises(UserError, match="is a memory already"):
        retrieval_memory.Memory.build(built.path, make_documents(2), encoder)
    (tmp_path / "run" / "retriever").mkdir(parents=True)
    with pytest.raises(UserError, match="retriever is in the way"):
        retrieval_memory.Memory.build(
            tmp_path / "run", make_documents(2), encoder, carried={"retriever": weights}
        )
    assert os.listdir(tmp_path / "run") == ["retriever"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        retrieval_memory.Memory.build(tmp_path / "file", make_documents(2), encoder)
    with pytest.raises(UserError, match="remote"):
        retrieval_memory.Memory.build("gs://bucket/mem", make_documents(2), encoder)
    options = writer.Options(index="flat")
    with pytest.raises(UserError, match="no index 'flat'"):
        retrieval_memory.Memory.build(tmp_path / "new", make_documents(2), encoder, options=options)
    with pytest.raises(UserError, match="is not a folder"):
        retrieval_memory.Memory.build(
            tmp_path / "new", make_documents(2), encoder, carried={"retriever": tmp_path / "no"}
        )
    assert not (tmp_path / "new").exists()


def test_one_writer_at_a_time(built, encoder, tokenizer):
    with writer._lock(built.path), pytest.raises(UserError, match="Another process is writing"):
        built.add(make_documents(1, 20), tokenizer)
    assert len(built.add(make_documents(1, 20), tokenizer)) == 16


@pytest.mark.parametrize("when", ["batch", "manifest", "switch"])
def test_a_killed_writer_leaves_no_half_memory(tmp_path, encoder, when):
    path = tmp_path / "mem"

    def kill(action: str) -> None:
        done = fresh_python.run(PROGRAMS / "killed_writer.py", action, when, path)
        assert done.returncode == -signal.SIGKILL, done.stderr

    kill("build")
    with pytest.raises(UserError, match="was not finished"):
        retrieval_memory.Memory.open(path)
    built = retrieval_memory.Memory.build(path, make_documents(15), encoder, options=SMALL)
    assert built.verify() == []
    kill("add")
    assert len(retrieval_memory.Memory.open(path)) == 15
    assert verify.verify(path) == []
    grown = built.add(make_documents(3, 30), options=SMALL)
    assert (len(grown), grown.verify()) == (18, [])
