"""An image tokenizer with a vocabulary, which needs no training, and corpora built with it."""

import functools
import pathlib

import numpy as np
from stand_in import StandInTokenizer, make_documents

from rag_mm.core import document_types
from rag_mm.corpus import corpus_reader, write_corpus
from rag_mm.data import vocabulary
from rag_mm.memory.writing import stream


@functools.cache
def make_vocabulary() -> vocabulary.Vocabulary:
    """Ids of the bytes, and 256 codes."""
    return vocabulary.train_vocabulary(["thing number"] * 2, 260, 256, 4)


class CodeStandIn(StandInTokenizer):
    """Codes are the brightness of each quadrant; counts the images that it encoded."""

    grids = ((2, 2),)

    def __init__(self, fingerprint: str = "stand-in codes"):
        super().__init__(fingerprint)
        self.vocabulary = make_vocabulary()
        self.num_encoded = 0

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        self.num_encoded += len(pixels)
        return super().encode(pixels)


class Items:
    """A source of documents and bad records, as given."""

    def __init__(self, items, fingerprint: str = "items"):
        self._items = list(items)
        self.size = len(self._items)
        self.fingerprint = fingerprint

    def read(self, start: int):
        for i in range(start, self.size):
            item = self._items[i]
            kind = "reject" if isinstance(item, stream.Reject) else "document"
            yield stream.Item(i + 1, **{kind: item})


def text_document(name: str, text: str) -> document_types.Document:
    return document_types.Document(name, (document_types.Text(text),))


def tokenizer_folder(folder: pathlib.Path) -> pathlib.Path:
    """What a corpus carries of the tokenizer."""
    folder.mkdir(exist_ok=True)
    make_vocabulary().save(folder / "vocabulary.json")
    return folder


def build(path, items, tokenizer=None, **options) -> corpus_reader.TokenCorpus:
    """A corpus of one source in shards of four records."""
    options = {"shard_size": 4, "max_bad": 0.5, **options}
    source = items if hasattr(items, "read") else Items(items)
    write_corpus.build(
        path,
        {"source": source},
        tokenizer or CodeStandIn(),
        tokenizer_folder(path.with_name("carried")),
        write_corpus.BuildOptions(**options),
    )
    return corpus_reader.TokenCorpus(path)


def documents(count: int, start: int = 0):
    return make_documents(count, start)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file of a folder but its lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith("-lock")
    }


def one_by_one(draw):
    """A `corpus_loader.Draw` of a function (main, neighbors, generator) -> arrays of one sequence."""

    def draw_all(flat, num_docs, generators):
        rows, at = [], 0
        for number, count in enumerate(num_docs.tolist()):
            docs = [flat.example(i) for i in range(at, at + count)]
            rows.append(draw(flat.example(at + count), docs, generators(number)))
            at += count + 1
        joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        return joined, np.array([len(row["segment_ids"]) for row in rows])

    return draw_all
