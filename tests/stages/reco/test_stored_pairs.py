"""Pairs on disk: the embeddings of the documents, restarted where they were killed, and their neighbors."""

import dataclasses
import pathlib
import tracemalloc

import numpy as np
import pytest
from etils import epath
from stand_in import StandInEncoder, make_documents

from rag_mm.core import document_types
from rag_mm.core.errors import UserError
from rag_mm.data import open_documents, pipeline
from rag_mm.memory import model_protocols, retrieval_memory
from rag_mm.memory.store.mapped_rows import MappedRows
from rag_mm.memory.writing import stream, writer
from rag_mm.models import reco
from rag_mm.stages.reco import embed_documents, stored_pairs
from rag_mm.stages.reco.refinement import SearchSettings
from rag_mm.stages.reco.train_fusion import FusionStageConfig
from rag_mm.train import loop, optimizer

COUNT, SHARD = 23, 5
DOCUMENTS = make_documents(COUNT, start=100)


class Killed(Exception):
    """Stands for a kill."""


class Source:
    """The documents, with one that has no image and a bad record among them."""

    size, fingerprint = COUNT + 2, "source"

    def read(self, start):
        words = document_types.Document("words", (document_types.Text("only words"),))
        items = [*DOCUMENTS[:7], words, stream.Reject("bad", "truncated", "is cut"), *DOCUMENTS[7:]]
        for position in range(start, self.size):
            item = items[position]
            kind = "reject" if isinstance(item, stream.Reject) else "document"
            yield stream.Item(position + 1, **{kind: item})


class KilledEncoder(StandInEncoder):
    """Fails at a batch of texts."""

    def __init__(self, last: int):
        super().__init__()
        self.left = last

    def encode_text(self, texts):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().encode_text(texts)


@pytest.fixture
def memory(tmp_path):
    options = writer.Options(index="exact", batch_size=8)
    folder = tmp_path / "mem"
    return retrieval_memory.Memory.build(
        folder, make_documents(20), StandInEncoder(), options=options
    )


@pytest.fixture
def embed(memory, monkeypatch):
    """Runs the stage in a folder with the stand-in's towers."""
    monkeypatch.setattr(open_documents, "open_documents", lambda spec: Source())

    def call(folder: pathlib.Path, encoder=None, **changes):
        encoder = encoder or StandInEncoder()
        monkeypatch.setattr(embed_documents, "open_memory", lambda path, batch: (memory, encoder))
        values = dict(
            seed=0, world=None, documents="x", memory="y", shard_size=SHARD, embed_batch=2
        )
        config = embed_documents.DocumentPairsStageConfig(**values | changes)
        metrics = embed_documents.run(config, None, epath.Path(folder))
        return metrics, stored_pairs.load(epath.Path(folder))

    return call


def files_below(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_pairs_are_the_documents_in_half_precision(embed, memory, tmp_path):
    metrics, pairs = embed(tmp_path / "pairs")
    assert metrics == {"train": COUNT, "shards": 5, "memory": 20}
    assert pairs.rows == (5, 3, 5, 5, 5) and len(pairs) == COUNT and pairs.dim == 24
    wanted = model_protocols.embed(DOCUMENTS, StandInEncoder())
    rows = np.array([22, 0, 7])
    batch = pairs.take(rows)
    for name in reco.MODALITIES:
        np.testing.assert_allclose(batch[name], wanted[name][rows], atol=5e-4)
    assert batch["class_ids"].tolist() == [-1, -1, -1]
    assert pairs.memory.open().fingerprint == memory.fingerprint


def test_a_killed_stage_embeds_only_what_is_missing(embed, tmp_path):
    with pytest.raises(Killed):
        embed(tmp_path / "killed", KilledEncoder(7))
    encoder = StandInEncoder()
    embed(tmp_path / "killed", encoder)
    assert sum(encoder.batches) == 2 * (COUNT - 8)  # Two of five shards were whole.
    embed(tmp_path / "whole")
    assert files_below(tmp_path / "killed") == files_below(tmp_path / "whole")


def test_other_documents_or_towers_start_over(embed, tmp_path):
    embed(tmp_path / "pairs")
    encoder = StandInEncoder("others")
    _, pairs = embed(tmp_path / "pairs", encoder)
    assert sum(encoder.batches) == 2 * COUNT and pairs.towers == "others"


@pytest.mark.parametrize(("limit", "used"), [(3, 3), (5, 5), (12, 10), (100, COUNT)])
def test_only_the_first_documents_are_used(embed, tmp_path, limit, used):
    """Of twelve records, one is bad and one has no image."""
    encoder = StandInEncoder()
    metrics, pairs = embed(tmp_path / "pairs", encoder, max_documents=limit)
    assert metrics["train"] == len(pairs) == used
    assert sum(encoder.batches) == 2 * used


def test_of_a_tar_that_is_embedded_whole_the_first_documents_are_used(embed, tmp_path, monkeypatch):
    whole = embed_documents.source_ranges.Range(0, 0, COUNT + 2)
    monkeypatch.setattr(embed_documents.source_ranges, "split", lambda source, size: [whole])
    monkeypatch.setattr(Source, "size", None)
    monkeypatch.setattr(
        Source, "read", lambda self, start: (stream.Item(i + 1, d) for i, d in enumerate(DOCUMENTS))
    )
    metrics, pairs = embed(tmp_path / "pairs", max_documents=9)
    assert metrics["train"] == len(pairs) == 9 and pairs.rows == (9,)


def test_documents_without_a_pair_are_refused(embed, tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "read", lambda self, start: iter(()))
    with pytest.raises(UserError, match="no document with both an image and a text"):
        embed(tmp_path / "pairs")


def test_neighbors_are_the_nearest_rows_of_the_other_modality(embed, memory, tmp_path):
    _, pairs = embed(tmp_path / "pairs")
    found = stored_pairs.find_neighbors(
        SearchSettings(num_neighbors=3), pairs, epath.Path(tmp_path)
    )
    rows = np.array([20, 1, 6])
    for name, other in (("image", "text"), ("text", "image")):
        scores = pairs.take(rows)[name] @ memory.embeddings(name).T
        nearest = np.argsort(-scores, axis=1)[:, :3]
        retrieved, is_there = found[name].take(rows)
        np.testing.assert_array_equal(retrieved, memory.embeddings(other)[nearest])
        assert is_there.all()


def test_found_neighbors_are_kept_and_need_no_index(embed, tmp_path, monkeypatch):
    _, pairs = embed(tmp_path / "pairs")
    search, folder = SearchSettings(num_neighbors=3), epath.Path(tmp_path)
    first = stored_pairs.find_neighbors(search, pairs, folder)
    before = files_below(tmp_path / "neighbors")
    (tmp_path / "neighbors/shards/commit-00002.json").unlink()
    stored_pairs.find_neighbors(search, pairs, folder)
    assert files_below(tmp_path / "neighbors") == before
    monkeypatch.setattr(
        retrieval_memory.Memory, "index", lambda *args: pytest.fail("searched again")
    )
    again = stored_pairs.find_neighbors(search, pairs, folder)
    np.testing.assert_array_equal(again["image"].ids[:], first["image"].ids[:])


def test_other_settings_search_again(embed, tmp_path):
    _, pairs = embed(tmp_path / "pairs")
    stored_pairs.find_neighbors(SearchSettings(num_neighbors=3), pairs, epath.Path(tmp_path))
    found = stored_pairs.find_neighbors(
        SearchSettings(num_neighbors=2), pairs, epath.Path(tmp_path)
    )
    assert found["image"].ids.shape == (COUNT, 2)


def test_overrides_retrieve_the_query_or_random_rows(embed, tmp_path):
    _, pairs = embed(tmp_path / "pairs")
    rows = np.array([21, 3])
    query = SearchSettings(num_neighbors=2, retrieval_override="query")
    found = stored_pairs.find_neighbors(query, pairs, epath.Path(tmp_path))["text"].take(rows)[0]
    np.testing.assert_array_equal(found[:, 0], pairs.take(rows)["text"])
    random = SearchSettings(num_neighbors=2, retrieval_override="random")
    ids = stored_pairs.find_neighbors(random, pairs, epath.Path(tmp_path))["text"].ids[:]
    assert len({tuple(row) for row in ids.tolist()}) > COUNT / 2  # Each shard has its own.


def test_another_memory_at_the_place_is_refused(embed, tmp_path):
    _, pairs = embed(tmp_path / "pairs")
    other = dataclasses.replace(pairs.memory, fingerprint="0" * 64)
    with pytest.raises(UserError, match="put that one back"):
        other.open()


def test_an_epoch_has_every_pair_once_and_its_own_order(embed, tmp_path):
    _, pairs = embed(tmp_path / "pairs")
    epochs = [pairs.draw(epoch, np.arange(COUNT), seed=5) for epoch in (0, 1)]
    assert all(sorted(epoch.tolist()) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()


def test_pairs_on_disk_are_not_added_to_the_memory():
    with pytest.raises(ValueError, match="build the memory with their documents"):
        FusionStageConfig(
            seed=0,
            world=None,
            model={},
            optimizer=optimizer.OptimizerConfig(),
            loop=loop.LoopConfig(num_steps=1),
            pairs="document_pairs",
            train_in_memory=True,
        )


def peak_bytes(folder: pathlib.Path, count: int) -> int:
    """What is allocated at most while batches are drawn from so many pairs."""
    folder.mkdir()
    rng, shape = np.random.default_rng(0), (count, 8)
    columns = {}
    for name in reco.MODALITIES:
        np.save(folder / f"{name}.npy", rng.normal(size=shape).astype(np.float16))
        columns[name] = MappedRows([np.load(folder / f"{name}.npy", mmap_mode="r")], 8)
    used = stored_pairs.UsedMemory("", 1, "")
    pairs = stored_pairs.StoredPairs(columns, (count,), "towers", used)
    tracemalloc.start()
    drawn = pipeline.make_array_batches(
        count, 256, 0, pairs.take, draw=lambda epoch, at: pairs.draw(epoch, at, 0)
    )
    for _ in range(20):
        next(drawn)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_batches_take_as_much_memory_of_many_pairs_as_of_few(tmp_path):
    peak_bytes(tmp_path / "first", 300)  # Imports and caches.
    few, many = peak_bytes(tmp_path / "few", 1_000), peak_bytes(tmp_path / "many", 500_000)
    assert many < few + 100_000  # One number for each pair would be 4 MB.
