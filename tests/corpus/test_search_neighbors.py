"""Neighbors in a memory: not the document itself nor one of its caption; resumed; never stale."""

import shutil

import numpy as np
import pytest
from corpus_cases import (
    CodeStandIn,
    Items,
    build,
    contents,
    documents,
    one_by_one,
    text_document,
)
from stand_in import StandInEncoder

from rag_mm.core.document_types import Document, Text
from rag_mm.core.errors import UserError
from rag_mm.corpus import corpus_loader, neighbor_rows, search_neighbors
from rag_mm.corpus.packing_plan import MixturePart, RowsConfig
from rag_mm.data import sequences
from rag_mm.memory import retrieval_memory
from rag_mm.memory.writing import writer

# The last has the caption of doc-003; one has no image, one no text.
GIVEN = [
    *documents(9),
    text_document("t", "thing number5 and more"),
    Document("i", documents(1, 50)[0].segments[1:]),
    Document("twin", (Text("thing number3"), documents(1, 60)[0].segments[1])),
]


@pytest.fixture
def memory(tmp_path):
    options = writer.Options(index="exact")
    return retrieval_memory.Memory.build(tmp_path / "mem", GIVEN, StandInEncoder(), options=options)


@pytest.fixture
def corpus(tmp_path):
    return build(tmp_path / "corpus", GIVEN)


def search(corpus, memory, source=None, tokenizer=None, **options):
    found = search_neighbors.search(
        corpus,
        memory,
        [source or Items(GIVEN)],
        tokenizer or CodeStandIn(),
        search_neighbors.SearchOptions(**options),
    )
    return neighbor_rows.NeighborRows(found, corpus)


def test_neighbors_are_others_by_text_and_by_image(corpus, memory):
    rows = search(corpus, memory).take(np.arange(len(GIVEN)))
    assert rows.shape == (12, 2, 2) and rows.max() < len(memory)
    for number, by_query in enumerate(rows):
        assert number not in by_query
    assert 11 not in rows[3] and 3 not in rows[11]  # They have one caption.
    assert (rows[9, 1] == -1).all() and (rows[10, 0] == -1).all()  # Without image, without text.
    assert (np.delete(rows, (9, 10), axis=0) >= 0).all()


def test_the_nearest_comes_first(corpus, memory):
    rows = search(corpus, memory, word_dropout=0.0).take(np.arange(9))
    vectors = memory.embeddings("mixed")
    query = memory.encode(text="thing number4")
    nearest = np.argsort(-(vectors @ query[0]))
    assert rows[4, 0].tolist() == [row for row in nearest.tolist() if row != 4][:2]


def test_the_memorys_documents_are_kept_as_tokens(corpus, memory):
    neighbors = search(corpus, memory)
    found = neighbors.documents.read(np.arange(len(memory)))
    assert [d.id for d in found] == list(memory.ids)
    text = found[9].example.segments[0].ids
    assert corpus.vocabulary.decode_text(text) == "thing number5 and more"


def test_an_interrupted_search_ends_with_the_same_bytes(corpus, memory, tmp_path):
    path = search(corpus, memory).path
    shutil.copytree(path, tmp_path / "whole")
    (path / "manifest.json").unlink()
    (path / "shards" / "neighbors-00001.npy").write_bytes(b"cut")
    tokenizer = CodeStandIn()
    search(corpus, memory, tokenizer=tokenizer)
    assert tokenizer.num_encoded == 0
    assert contents(path) == contents(tmp_path / "whole")


def test_neighbors_of_a_corpus_that_was_built_anew_are_refused(corpus, memory, tmp_path):
    path = search(corpus, memory).path
    other = build(tmp_path / "other", documents(5))
    shutil.copytree(path, other.path / path.name)
    with pytest.raises(UserError, match="neighbors of another corpus than .*; delete the folder"):
        search(other, memory, Items(documents(5)))
    with pytest.raises(UserError, match="holds no finished neighbors; run `rag-mm corpus neigh"):
        neighbor_rows.NeighborRows(tmp_path / "nothing", corpus)


def test_other_settings_and_changed_sources_are_refused(corpus, memory):
    with pytest.raises(UserError, match="source has changed since .* was built; build the corpus"):
        search(corpus, memory, Items(GIVEN, "changed"))
    with pytest.raises(UserError, match="A source of .* has changed since it was built"):
        search(corpus, memory, Items([*GIVEN[1:], GIVEN[0]]))
    with pytest.raises(UserError, match="has no codes of the corpus's image tokenizer"):
        search(corpus, memory, max_equal_codes=0.5)
    search(corpus, memory)
    with pytest.raises(UserError, match="was searched with num_neighbors 2, not 3; delete it"):
        search(corpus, memory, num_neighbors=3)
    assert len(search(corpus, memory).take(np.arange(3))) == 3  # The same settings: nothing to do.


def test_a_row_holds_the_neighbors_before_their_document(corpus, memory):
    neighbors = search(corpus, memory)
    vocabulary = corpus.vocabulary
    layout = sequences.Layout(2, 32, 4, 0, sequences.PACKED, 128)

    @one_by_one
    def draw(main, docs, rng):
        assert len(docs) <= 2
        return sequences.as_row(vocabulary, sequences.lay_out(layout, vocabulary, main, docs))

    part = MixturePart(corpus, neighbors=neighbors)
    config = RowsConfig(128, max_text_len=32, num_docs_weights=(0.0, 0.0, 1.0), window=12)
    iterator = corpus_loader.make_batches([part], config, 2, draw, padding={"tokens": 0})
    rows = neighbors.take(np.arange(12))
    for _ in range(4):
        batch = next(iterator)
        for tokens, ids, records in zip(
            batch["tokens"], batch["segment_ids"], batch["records"], strict=True
        ):
            for number in range(1, ids.max() + 1):
                (record,) = set(records[ids == number].tolist())
                text = vocabulary.decode_text(
                    [t for t in tokens[ids == number] if t < vocabulary.text_size]
                )
                possible = {GIVEN[row].text for row in rows[record].ravel() if row >= 0}
                assert text.endswith(GIVEN[record].text)
                assert any(text.startswith(other) for other in possible)
