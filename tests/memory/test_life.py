"""A memory's life as a model: whatever is done in whatever order, it answers as exact search does."""

import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from stand_in import StandInEncoder, StandInTokenizer, make_documents

from rag_mm.core.errors import UserError
from rag_mm.memory import retrieval_memory
from rag_mm.memory.index import scann as scann_index
from rag_mm.memory.index.exact import ExactIndex
from rag_mm.memory.writing import near_duplicates, writer

SMALL = writer.Options(index="exact", batch_size=4, shard_size=6)


class Life(RuleBasedStateMachine):
    """Adds, removes, merges, compacts and reopens; `live` is what should be there, in order."""

    @initialize(kind=st.sampled_from(["exact", "scann", "hashed", "device"]))
    def build(self, kind):
        self.encoder = StandInEncoder()
        self.folder = tempfile.TemporaryDirectory()
        self.next = 0
        scann = scann_index.ScannConfig(scoring="hashed") if kind == "hashed" else None
        self.options = writer.Options(
            "scann" if kind == "hashed" else kind, scann, batch_size=4, shard_size=6
        )
        # Hashing trains sixteen centres on the rows.
        documents = self.new(20 if kind == "hashed" else 5)
        self.live = list(documents)
        self.memory = retrieval_memory.Memory.build(
            f"{self.folder.name}/mem", documents, self.encoder, options=self.options
        )

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def new(self, count):
        documents = make_documents(count, self.next)
        self.next += count
        return documents

    @rule(count=st.integers(1, 8))
    def add(self, count):
        documents = self.new(count)
        self.memory = self.memory.add(documents, options=self.options)
        self.live += documents

    @rule(data=st.data())
    def remove(self, data):
        if not self.live:
            return
        gone = data.draw(
            st.lists(st.sampled_from([d.id for d in self.live]), min_size=1, unique=True)
        )
        self.memory = self.memory.remove(gone)
        self.live = [d for d in self.live if d.id not in gone]

    @rule(data=st.data())
    def add_back(self, data):
        """An id that was removed may come again."""
        missing = sorted({f"doc-{i:03d}" for i in range(self.next)} - {d.id for d in self.live})
        if missing:
            name = data.draw(st.sampled_from(missing))
            documents = make_documents(1, int(name.removeprefix("doc-")))
            self.memory = self.memory.add(documents, options=self.options)
            self.live += documents

    @rule(count=st.integers(2, 5))
    def merge(self, count):
        documents = self.new(count)
        path = f"{self.folder.name}/other-{self.next}"
        other = retrieval_memory.Memory.build(path, documents, self.encoder, options=self.options)
        other = other.remove([documents[0].id])
        self.memory = self.memory.merge(other)
        self.live += documents[1:]

    @rule(prune=st.booleans())
    def compact(self, prune):
        self.memory = self.memory.compact(prune)
        assert self.memory.stats()["removed"] == 0

    @rule()
    def reopen(self):
        self.memory = retrieval_memory.Memory.open(self.memory.path, self.encoder)

    @invariant()
    def answers_as_exact_search(self):
        if not hasattr(self, "memory"):
            return
        assert self.memory.ids == tuple(d.id for d in self.live)
        assert len(self.memory) == len(self.live)
        if self.live:
            row = len(self.live) // 2
            np.testing.assert_array_equal(self.memory.document(row).image, self.live[row].image)
        oracle = ExactIndex()
        rows = self.memory.embeddings("text")
        oracle.build(rows)
        queries = self.encoder.encode_text(["thing number1", "thing number7 and number8"])
        k = len(self.live) + 3
        found = self.memory.search(vectors=queries, view="text", k=k)
        right = oracle.search(queries, k)
        np.testing.assert_allclose(found.scores, right.scores, atol=1e-5)
        assert (np.sort(found.ids) == np.sort(right.ids)).all()
        assert (found.ids[:, len(self.live) :] == -1).all()


Life.TestCase.settings = settings(
    max_examples=12,
    stateful_step_count=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestLife = Life.TestCase


@pytest.fixture
def built(tmp_path, encoder, tokenizer):
    return retrieval_memory.Memory.build(
        tmp_path / "mem", make_documents(15), encoder, tokenizer, options=SMALL
    )


def test_documents_go_by_id_url_and_license(built):
    after = built.remove(ids=["doc-003"], urls=["http://x/5", "http://x/6"])
    assert after.manifest.version == 2
    assert set(built.ids) - set(after.ids) == {"doc-003", "doc-005", "doc-006"}
    assert after.stats()["with_image"] == after.stats()["rows"] == 12
    np.testing.assert_array_equal(after.codes, np.delete(built.codes, [3, 5, 6], axis=0))
    np.testing.assert_array_equal(
        after.embeddings("image"), np.delete(built.embeddings("image"), [3, 5, 6], axis=0)
    )
    assert after.document(3).id == "doc-004"
    assert after.fingerprint != built.fingerprint
    assert after.verify() == []
    with pytest.raises(UserError, match="no document with the id 'doc-003': nothing was removed"):
        after.remove(ids=["doc-001", "doc-003"])
    with pytest.raises(UserError, match="Nothing to remove"):
        after.remove()
    nothing = after.remove(licenses=["CC0"])
    assert (len(nothing), nothing.verify()) == (0, [])
    assert (nothing.search(text="thing", k=3).ids == -1).all()
    assert nothing.codes.shape == (0, 4)
    empty = nothing.compact()
    assert (len(empty), empty.verify()) == (0, [])
    again = empty.add(make_documents(3), StandInTokenizer())
    assert (again.ids, again.verify()) == (tuple(f"doc-{i:03d}" for i in range(3)), [])
    # The first version is still there, whole.
    assert retrieval_memory.Memory.open(built.path, version=1).ids == built.ids


def test_compact_leaves_behind_what_was_removed(built, encoder):
    after = built.remove(ids=[f"doc-{i:03d}" for i in range(0, 15, 2)])
    small = after.compact()
    assert small.ids == after.ids
    for view in ("image", "text", "mixed"):
        np.testing.assert_array_equal(small.embeddings(view), after.embeddings(view))
    np.testing.assert_array_equal(small.codes, after.codes)
    assert small.stats()["bytes"] < after.stats()["bytes"]
    assert after.document(0).id == small.document(0).id == "doc-001"
    (built.path / "manifest.json").write_text("{}")  # As where a run's stage made it.
    with pytest.raises(UserError, match="a run's own memory"):
        small.compact(prune=True)
    (built.path / "manifest.json").unlink()
    pruned = small.compact(prune=True)
    assert sorted(path.name for path in built.path.iterdir() if path.is_dir()) == ["v000004"]
    assert pruned.verify() == []
    with pytest.raises(UserError, match="v000001"):
        retrieval_memory.Memory.open(built.path, version=1)
    assert (
        len(
            retrieval_memory.Memory.open(built.path, encoder).add(
                make_documents(1), StandInTokenizer()
            )
        )
        == 8
    )


def test_merge_refuses_what_does_not_belong_together(tmp_path, built, encoder):
    other = retrieval_memory.Memory.build(
        tmp_path / "other", make_documents(3, 14), encoder, StandInTokenizer(), options=SMALL
    )
    with pytest.raises(UserError, match="Both memories have the id 'doc-014'"):
        built.merge(other)
    merged = built.merge(other.remove(["doc-014"]))
    assert merged.ids == tuple(f"doc-{i:03d}" for i in range(17))
    assert merged.verify() == []
    bare = retrieval_memory.Memory.build(
        tmp_path / "bare", make_documents(1, 40), encoder, options=SMALL
    )
    with pytest.raises(UserError, match="has tokenizer None"):
        built.merge(bare)
    foreign = retrieval_memory.Memory.build(
        tmp_path / "foreign", make_documents(1, 40), StandInEncoder("x"), options=SMALL
    )
    with pytest.raises(UserError, match="has encoder x"):
        built.merge(foreign)
    assert retrieval_memory.Memory.open(built.path).ids == merged.ids


def test_a_document_finds_itself_in_every_view(built):
    for view in ("image", "text", "mixed"):
        found = built.search(document=built.document(7), view=view, k=1)
        assert found.ids[0, 0] == 7
        np.testing.assert_allclose(found.scores[0, 0], 1, atol=1e-5)


def test_evaluation_items_and_their_likes_stay_out(tmp_path, encoder):
    documents = make_documents(12)
    held = [documents[2], make_documents(1, 50)[0]]
    excluded = near_duplicates.ExclusionSet.from_documents(held, encoder)
    # The same picture by another name, and the same name with another picture.
    twin = make_documents(1, 50)[0]
    twin = type(twin)("twin", twin.segments)
    other = type(twin)("doc-050", make_documents(1, 60)[0].segments)
    built = retrieval_memory.Memory.build(
        tmp_path / "mem",
        [*documents, twin, other],
        encoder,
        options=writer.Options("exact", None, 4, 6, exclude=excluded),
    )
    kept = {f"doc-{i:03d}" for i in range(12)} - {"doc-002"}
    assert set(built.ids) == kept
    counts = built.stats()["last_ingest"]
    assert counts["excluded"] == {"excluded-id": 2, "excluded-picture": 1}
    with pytest.raises(UserError, match="All 1 documents were excluded"):
        built.add([twin], options=writer.Options(exclude=excluded))


def test_repeats_are_kept_unless_they_are_asked_away(tmp_path, encoder):
    first = make_documents(3)
    same = type(first[0])("again", first[0].segments)
    retold = type(first[0])("retold", (first[1].segments[0], first[0].segments[1]))
    documents = [*first, same, retold]
    assert (
        len(retrieval_memory.Memory.build(tmp_path / "all", documents, encoder, options=SMALL)) == 5
    )
    options = writer.Options("exact", None, 2, 2, dedup=0.98)
    built = retrieval_memory.Memory.build(tmp_path / "few", documents, encoder, options=options)
    assert built.ids == ("doc-000", "doc-001", "doc-002", "retold")
    assert built.stats()["last_ingest"]["excluded"] == {"near-duplicate": 1}
    with pytest.raises(UserError, match="were excluded"):
        built.add([type(first[0])("later", first[2].segments)], options=options)
