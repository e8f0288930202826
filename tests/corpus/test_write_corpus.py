"""A corpus holds its sources' good documents, whoever made its shards and however often they were killed."""

import contextlib
import json
import pathlib
import signal
import tracemalloc
import types

import fresh_python
import numpy as np
import pytest
from corpus_cases import CodeStandIn, Items, build, contents, documents, text_document

from rag_mm.core.errors import UserError
from rag_mm.corpus import corpus_reader, folder_parts, write_corpus
from rag_mm.data.token_documents import IMAGE, TEXT
from rag_mm.memory.writing import ingest_report, stream

PROGRAM = pathlib.Path(__file__).parent / "programs" / "killed_builder.py"
BAD = stream.Reject("line 3", "truncated", "ends before the image does.")


def test_documents_are_kept_as_text_ids_and_codes(tmp_path):
    given = documents(10)
    corpus = build(tmp_path / "corpus", given)
    found = corpus.read(np.arange(10))
    assert [d.id for d in found] == [d.id for d in given]
    assert (found[7].url, found[7].license) == ("http://x/7", "CC0")
    for document, original in zip(found, given, strict=True):
        text, image = document.example.segments
        assert (text.kind, image.kind) == (TEXT, IMAGE)
        assert corpus.vocabulary.decode_text(text.ids) == original.text
        np.testing.assert_array_equal(image.ids, CodeStandIn().encode(original.image[None])[0])
    assert image.ids.dtype == np.uint8 and text.ids.dtype == np.uint16


def test_a_manifest_counts_what_there_is(tmp_path):
    corpus = build(tmp_path / "corpus", [*documents(5), text_document("t", "only text")])
    contents = corpus.manifest
    assert [(s.rows, s.with_text, s.with_image, s.codes) for s in contents.shards] == [
        (4, 4, 4, 16),
        (2, 2, 1, 4),
    ]
    assert contents.licenses == (("CC0", 5), (None, 1))
    assert contents.grids == ((2, 2),) and contents.image_size == 8


def test_bad_records_are_skipped_counted_and_named(tmp_path):
    empty, nameless = text_document("e", " "), text_document("", "no id")
    first, second, *rest = documents(6)
    corpus = build(tmp_path / "corpus", [first, BAD, empty, second, first, nameless, *rest])
    assert [d.id for d in corpus.read(np.arange(len(corpus)))] == [d.id for d in documents(6)]
    counts, rejects = ingest_report.read_counts(corpus.path)
    assert (counts["read"], counts["added"]) == (10, 6)
    assert [(r.name, r.reason) for r in rejects] == [
        ("line 3", "truncated"),
        ("e", "nothing-to-embed"),
        ("", "empty-id"),
        ("doc-000", "duplicate-id"),  # In another shard than the first.
    ]


def test_too_many_bad_records_are_refused_and_a_higher_limit_encodes_nothing_again(tmp_path):
    items = [*documents(4), BAD, BAD]
    with pytest.raises(ingest_report.TooManyRejects, match="2 of 6 records are bad"):
        build(tmp_path / "corpus", items, max_bad=0.1)
    tokenizer = CodeStandIn()
    assert len(build(tmp_path / "corpus", items, tokenizer)) == 4
    assert tokenizer.num_encoded == 0


@pytest.mark.parametrize("bad", [BAD, documents(1)[0]])
def test_with_no_bad_record_allowed_the_first_ends_the_build(tmp_path, bad):
    with pytest.raises(UserError, match=r"ends before|have the id"):
        build(tmp_path / "corpus", [*documents(5), bad], max_bad=0)


def test_a_finished_corpus_and_a_foreign_folder_are_not_overwritten(tmp_path):
    build(tmp_path / "corpus", documents(2))
    with pytest.raises(UserError, match="is a corpus already"):
        build(tmp_path / "corpus", documents(2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        build(tmp_path / "other", documents(2))
    with pytest.raises(UserError, match="There are no documents"):
        build(tmp_path / "empty", [])


def test_one_command_writes_at_a_time(tmp_path):
    refused = pytest.raises(UserError, match="Another process is writing")
    with folder_parts.lock(tmp_path / "corpus"), refused:
        build(tmp_path / "corpus", documents(2))


@pytest.fixture(scope="session")
def killed(tmp_path_factory):
    """Folder of corpora whose builders were killed at a named point."""
    folder = tmp_path_factory.mktemp("killed")
    done = fresh_python.run(PROGRAM, folder, check=True, path=(pathlib.Path(__file__).parent,))
    signals = json.loads(done.stdout)
    assert set(signals.values()) == {int(signal.SIGKILL)} and len(signals) == 5, signals
    return folder


POINTS = ["in a shard", "shard written", "shard marked", "report written", "tokenizer copied"]


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_build_is_no_corpus_and_ends_with_the_same_bytes(killed, tmp_path, point):
    path = killed / point
    with pytest.raises(UserError, match="is an unfinished corpus"):
        corpus_reader.TokenCorpus(path)
    tokenizer = CodeStandIn()
    build(path, documents(15), tokenizer)
    if point == "tokenizer copied":
        assert tokenizer.num_encoded == 0
    build(tmp_path / "whole", documents(15))
    assert contents(path) == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["records", "segments", "commit"])
def test_a_damaged_shard_is_made_again(tmp_path, damage):
    path, whole = tmp_path / "corpus", tmp_path / "whole"
    build(whole, documents(12))
    build(path, documents(12))
    (path / "manifest.json").unlink()
    (damaged,) = path.glob(f"shards/{damage}-00001.*")
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 255
    damaged.write_bytes(data)
    tokenizer = CodeStandIn()
    build(path, documents(12), tokenizer)
    assert tokenizer.num_encoded == 4
    assert contents(path) == contents(whole)


def test_another_source_starts_over(tmp_path):
    path = tmp_path / "corpus"
    build(path, documents(12))
    (path / "manifest.json").unlink()
    build(path, Items(documents(6, 20), "another"))
    build(tmp_path / "whole", Items(documents(6, 20), "another"))
    assert contents(path) == contents(tmp_path / "whole")


def test_the_shards_of_two_processes_are_those_of_one(tmp_path, monkeypatch):
    build(tmp_path / "one", documents(15))
    encoded = []
    # Really the leader waits for the other; here it comes back when that has finished.
    for index, ending in ((0, pytest.raises(UserError, match="Part 1 of")), (1, None), (0, None)):
        fake = types.SimpleNamespace(process_index=lambda i=index: i, process_count=lambda: 2)
        monkeypatch.setattr(folder_parts, "jax", fake)
        source, tokenizer = {"source": Items(documents(15))}, CodeStandIn()
        options = write_corpus.BuildOptions(shard_size=4, max_bad=0.5)
        with ending or contextlib.nullcontext():
            write_corpus.build(tmp_path / "two", source, tokenizer, tmp_path / "carried", options)
        encoded.append(tokenizer.num_encoded)
    assert encoded == [8, 7, 0]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path):
    def peak(name: str, count: int) -> int:
        class Lazy(Items):
            def read(self, start):
                for i in range(start, self.size):
                    yield stream.Item(i + 1, documents(1, i)[0])

        tracemalloc.start()
        build(tmp_path / name, Lazy([None] * count), shard_size=16)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak("warm", 16)
    assert peak("many", 320) < 1.3 * peak("few", 64)
