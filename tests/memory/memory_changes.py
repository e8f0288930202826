"""Changes of a memory of numbered documents: what each makes of its state, and the state read back."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from stand_in import StandInEncoder, StandInTokenizer, make_documents

from rag_mm.memory import retrieval_memory
from rag_mm.memory.store import manifest, verify
from rag_mm.memory.writing import changes, writer

OPTIONS = writer.Options(index="exact", batch_size=4, shard_size=6)
OWN_CODES = StandInTokenizer().fingerprint
OPERATIONS = ("build", "add", "remove", "add codes", "merge", "compact", "compact and prune")
MERGED = {"other 1": range(900, 908), "other 2": range(910, 917)}
"""Memories that are merged, beside the changed one: name -> numbers of their documents."""

Row = tuple[str, frozenset[str]]  # an id, and the tokenizers that its picture has codes of


@dataclasses.dataclass(frozen=True)
class State:
    """What a memory holds: the number of its version, and its rows in order; no memory is version 0."""

    version: int = 0
    rows: tuple[Row, ...] = ()


@dataclasses.dataclass(frozen=True)
class Operation:
    """A change by name; `words` are ids of documents, a tokenizer or the name of another memory."""

    name: str
    words: tuple[str, ...] = ()


def number(document_id: str) -> int:
    """The number that `make_documents` made an id of."""
    return int(document_id.removeprefix("doc-"))


def ids(numbers: range) -> tuple[str, ...]:
    """The ids of `make_documents`."""
    return tuple(f"doc-{i:03d}" for i in numbers)


def after(state: State, operation: Operation) -> State:
    """What an operation makes of a state."""
    name, words, rows = operation.name, operation.words, state.rows
    if name in ("build", "add", "merge"):
        new = ids(MERGED[words[0]]) if name == "merge" else words
        rows = rows + tuple((document, frozenset([OWN_CODES])) for document in new)
    elif name == "remove":
        rows = tuple(row for row in rows if row[0] not in words)
    elif name == "add codes":
        rows = tuple((document, codes | set(words)) for document, codes in rows)
    return State(state.version + 1, rows)


def perform(path: pathlib.Path, operation: Operation) -> None:
    """Changes the memory at `path`; the folder beside it holds those of `MERGED`."""
    name, words = operation.name, operation.words
    if name in ("build", "add"):
        documents = make_documents(len(words), number(words[0]))
        arguments = documents, StandInEncoder(), StandInTokenizer()
        write = functools.partial(writer.build, carried={}) if name == "build" else writer.add
        write(path, *arguments, options=OPTIONS)
    elif name == "remove":
        changes.remove(path, words)
    elif name == "add codes":
        changes.add_codes(path, StandInTokenizer(words[0]), OPTIONS.shard_size)
    elif name == "merge":
        changes.merge(path, path.parent / words[0], OPTIONS.shard_size)
    else:
        changes.compact(path, "prune" in name, OPTIONS.shard_size)


def choose(rng: np.random.Generator, state: State, name: str, fresh: Iterator[int]) -> Operation:
    """An operation of this name that the state allows; ids of new documents start at `next(fresh)`."""
    held = [document for document, _ in state.rows]
    if name == "remove":
        return Operation(name, tuple(rng.choice(held, rng.integers(1, 6), replace=False).tolist()))
    if name == "add codes":
        return Operation(name, (f"codes {state.version}",))
    if name == "merge":
        return Operation(name, (next(n for n, m in MERGED.items() if not {*ids(m)} & {*held}),))
    if name in ("build", "add"):
        start = next(fresh)
        return Operation(name, ids(range(start, start + int(rng.integers(5, 19)))))
    return Operation(name)


@functools.cache
def _expected(document: str) -> tuple[Any, np.ndarray, np.ndarray]:
    (made,) = make_documents(1, number(document))
    vector = StandInEncoder().encode_image(made.image[None])[0]
    return made, vector, StandInTokenizer().encode(made.image[None])[0]


def read(path: pathlib.Path) -> State:
    """The state of a memory.

    Raises:
        AssertionError: it does not verify, or a document, an embedding or a code is not what was written.
        UserError: it cannot be read.
    """
    if not (path / manifest.CURRENT).exists():
        return State()
    problems = verify.verify(path)
    assert not problems, problems
    opened = retrieval_memory.Memory.open(path)
    rows, embeddings = [], opened.embeddings("image")
    for row, document in enumerate(opened.ids):
        made, vector, codes = _expected(document)
        record = opened.record(row)
        held = record.document
        assert (held.id, held.text, held.url) == (document, made.text, made.url), held
        np.testing.assert_array_equal(held.image, made.image)
        np.testing.assert_allclose(embeddings[row], vector, atol=1e-5)
        for name in record.codes:
            np.testing.assert_array_equal(record.picture_codes(name)[0], codes)
        rows.append((document, frozenset(record.codes)))
    if rows:
        hits = opened.search(vectors=_expected(rows[0][0])[1][None], view="image", k=1)
        assert hits.ids[0][0] == 0, hits
    return State(opened.manifest.version, tuple(rows))
