"""Makes one shard of a corpus: checked documents as text ids and image codes."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from array_record.python import array_record_module

from rag_mm.core import document_types, files
from rag_mm.core.code_grids import Grids
from rag_mm.core.errors import UserError
from rag_mm.corpus import corpus_manifest, repeated_ids, token_record
from rag_mm.corpus.corpus_manifest import shard_file
from rag_mm.data import token_documents
from rag_mm.data.vocabulary import Vocabulary
from rag_mm.memory import model_protocols
from rag_mm.memory.store import record
from rag_mm.memory.writing import document_checks, record_codes, stream

_NO_LIMIT = 1 << 40  # Texts are kept whole; training cuts them.


class CodeTokenizer(model_protocols.ImageTokenizer, Protocol):
    """What a corpus needs of an image tokenizer in addition to what a memory does.

    Attributes:
        grids: (rows, columns) of each grid of an image's codes, coarse to fine.
    """

    grids: Grids

    @property
    def vocabulary(self) -> Vocabulary:
        """Ids of texts and of the codes; raises UserError if there is none."""
        ...


def record_format(tokenizer: CodeTokenizer) -> token_record.TokenFormat:
    """The integers of the records."""
    vocabulary = tokenizer.vocabulary
    return token_record.TokenFormat(vocabulary.text_size, vocabulary.codebook_size)


class ShardDraft:
    """One shard while it is made.

    Args:
        root: the corpus.
        number: of the shard.
        tokenizer: the image tokenizer.
        is_strict: whether a bad record is an error.
    """

    def __init__(self, root: Path, number: int, tokenizer: CodeTokenizer, is_strict: bool):
        self._root, self._number, self._is_strict = root, number, is_strict
        self._tokenizer = tokenizer
        self._format = record_format(tokenizer)
        self._ids: dict[str, None] = {}
        self._rejects: list[stream.Reject] = []
        self._notes: collections.Counter[str] = collections.Counter()
        self._licenses: collections.Counter[str | None] = collections.Counter()
        self._segments: list[tuple[int, int, int]] = []
        self._modalities: collections.Counter[str] = collections.Counter()

    def write(self, items: Iterator[stream.Item]) -> tuple[dict[str, Any], Sequence[Path]]:
        """Writes the good documents of the shard's records; what its mark says, and its files.

        Raises:
            UserError: a record is bad, where none may be.
        """
        names = [("records", "arrayrecord"), ("segments", "npy"), ("ids", "npy")]
        paths = [self._root / shard_file(what, self._number, ending) for what, ending in names]
        tokenizer = self._tokenizer
        entries = (record.Record(document, {}) for document in self._check(items))
        filled = record_codes.fill_all(entries, tokenizer, tokenizer.image_batch)
        with files.whole_file(paths[0]) as temporary:
            writer = array_record_module.ArrayRecordWriter(
                str(temporary), "group_size:1,uncompressed"
            )
            for row, entry in enumerate(filled):
                document = self._tokens(entry)
                writer.write(self._format.to_bytes(document))
                self._count(row, document)
            writer.close()
        segments = np.array(self._segments, np.int32).reshape(-1, 3)
        files.write_array(paths[1], segments)
        files.write_array(paths[2], repeated_ids.hash_ids(self._ids))
        return self._mark(segments), paths

    def _check(self, items: Iterator[stream.Item]) -> Iterator[document_types.Document]:
        for item in items:
            reject = item.reject
            if item.document is not None:
                is_known = item.document.id in self._ids
                reject = document_checks.find_problem(item.document, is_known)
            if reject is not None:
                if self._is_strict:
                    raise UserError(f"{reject.name}: {reject.detail}")
                self._rejects.append(reject)
            elif item.document is not None:
                self._ids[item.document.id] = None
                self._notes.update(item.notes)
                yield document_checks.fit(item.document, self._tokenizer.image_size)

    def _tokens(self, entry: record.Record) -> token_record.TokenDocument:
        document, tokenizer = entry.document, self._tokenizer
        codes = entry.picture_codes(tokenizer.fingerprint)
        example = token_documents.from_document(tokenizer.vocabulary, document, codes, _NO_LIMIT)
        return token_record.TokenDocument(document.id, document.url, document.license, example)

    def _count(self, row: int, document: token_record.TokenDocument) -> None:
        self._licenses[document.license] += 1
        kinds = {segment.kind for segment in document.example.segments}
        self._modalities.update(kinds)
        self._segments += token_record.segment_rows(row, document.example)

    def _mark(self, segments: np.ndarray) -> dict[str, Any]:
        is_image, lengths = segments[:, 1] == 1, segments[:, 2]
        shard = corpus_manifest.CorpusShard(
            rows=len(self._ids),
            with_text=self._modalities[token_documents.TEXT],
            with_image=self._modalities[token_documents.IMAGE],
            text_ids=int(lengths[~is_image].sum()),
            codes=int(lengths[is_image].sum()),
        )
        return {
            "shard": vars(shard),
            "rejects": [dataclasses.astuple(reject) for reject in self._rejects],
            "notes": dict(sorted(self._notes.items())),
            "licenses": list(self._licenses.items()),
        }
