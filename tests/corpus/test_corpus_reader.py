"""A corpus is read at random, and refused if it is not what its manifest says."""

import concurrent.futures
import json

import numpy as np
import pytest
from corpus_cases import build, documents, text_document

from rag_mm.core.errors import UserError
from rag_mm.corpus import corpus_reader, token_record
from rag_mm.data import token_documents


@pytest.fixture
def corpus(tmp_path):
    return build(tmp_path / "corpus", documents(11))


def test_documents_are_read_in_any_order_from_any_thread(corpus):
    def ids(seed: int) -> bool:
        numbers = np.random.default_rng(seed).integers(0, 11, 20)
        return [d.id for d in corpus.read(numbers)] == [f"doc-{n:03d}" for n in numbers]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ids, range(20)))


def test_lengths_count_each_segment_and_one_more(corpus, tmp_path):
    texts = build(tmp_path / "texts", [text_document("a", "ab"), text_document("b", "ab" * 20)])
    assert texts.lengths(max_text_len=5).tolist() == [3, 6]
    for length, document in zip(corpus.lengths(100), corpus.read(np.arange(11)), strict=True):
        assert length == sum(len(segment.ids) + 1 for segment in document.example.segments)


def test_a_corpus_of_another_tokenizer_is_refused(corpus):
    corpus.check_tokenizer("stand-in codes")
    with pytest.raises(
        UserError, match="holds codes of the image tokenizer stand-in cod, not of o"
    ):
        corpus.check_tokenizer("other")


def change(path, **fields):
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 7}, "has format 7, not 1; build the corpus again"),
        ({"shards": [{"rows": 1}]}, "is damaged"),
        ({"duplicates": 3}, "was changed"),
    ],
)
def test_a_manifest_of_another_version_or_damaged_is_refused(corpus, fields, message):
    change(corpus.path / "manifest.json", **fields)
    with pytest.raises(UserError, match=message):
        corpus_reader.TokenCorpus(corpus.path)


def test_damage_is_found(corpus):
    path = corpus.path / "shards" / "records-00001.arrayrecord"
    data = bytearray(path.read_bytes())
    at = data.index(b"doc-005")
    path.write_bytes(data[:at] + b"dOc" + data[at + 3 :])
    with pytest.raises(UserError, match="cannot be read"):
        corpus_reader.TokenCorpus(corpus.path).read(np.array([5]))
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match="was truncated or changed"):
        corpus_reader.TokenCorpus(corpus.path)
    vocabulary = corpus.path / "tokenizer" / "vocabulary.json"
    change(vocabulary, num_sentinels=9)
    with pytest.raises(UserError, match="was changed; build the corpus again"):
        _ = corpus.vocabulary


@pytest.mark.parametrize("path", ["gs://bucket/corpus", "nothing"])
def test_what_is_no_local_corpus_is_refused(path):
    with pytest.raises(UserError, match=r"is remote|is not a corpus"):
        corpus_reader.TokenCorpus(path)


def test_the_fingerprint_is_of_the_documents(corpus, tmp_path):
    assert build(tmp_path / "same", documents(11)).fingerprint == corpus.fingerprint
    assert build(tmp_path / "other", documents(10)).fingerprint != corpus.fingerprint


@pytest.mark.parametrize(
    ("text_size", "codebook_size", "dtypes"),
    [(256, 257, "|u1 <u2"), (65_536, 256, "<u2 |u1"), (65_537, 1, "<u4 |u1")],
)
def test_ids_are_kept_in_the_smallest_integers(text_size, codebook_size, dtypes):
    form = token_record.TokenFormat(text_size, codebook_size)
    assert " ".join(dtype.str for dtype in form.dtypes) == dtypes
    ids, codes = np.array([0, text_size - 1]), np.array([codebook_size - 1], np.int32)
    document = token_record.TokenDocument("é", None, "CC0", token_documents.pair(ids, codes))
    read = form.from_bytes(form.to_bytes(document))
    assert (read.id, read.url, read.license) == ("é", None, "CC0")
    assert [s.ids.tolist() for s in read.example.segments] == [ids.tolist(), codes.tolist()]
    too_large = token_documents.pair(ids, codes + 1)
    with pytest.raises(ValueError, match="image ids of 'x' are not in"):
        form.to_bytes(token_record.TokenDocument("x", None, None, too_large))
    with pytest.raises(UserError, match="A record is damaged"):
        form.from_bytes(form.to_bytes(document)[:-1])


def test_documents_read_as_a_few_arrays_are_those_read_one_by_one(corpus):
    numbers = np.array([7, 0, 10, 7])
    flat = corpus.read_flat(numbers).cut(9)
    for i, document in enumerate(corpus.read(numbers)):
        found, expected = flat.example(i), document.example.cut(9)
        assert [s.kind for s in found.segments] == [s.kind for s in expected.segments]
        for one, other in zip(found.segments, expected.segments, strict=True):
            np.testing.assert_array_equal(one.ids, other.ids)
    assert len(corpus.read_flat(numbers[:0]).firsts) == 1


@pytest.mark.parametrize("record", [b"", b"\xc0", b"\x94\xa1a\xc0\xc0\x92\x07\xc4\x00"])
def test_damaged_records_are_refused(record):
    with pytest.raises(UserError, match="A record is damaged"):
        token_record.TokenFormat(300, 300).read_flat([record])
