"""The memory: documents, their embeddings and codes, and an index for each view."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import document_types, image_files
from rag_mm.core.errors import UserError
from rag_mm.memory import model_protocols, stats, views
from rag_mm.memory.index import protocol
from rag_mm.memory.store import manifest, mapped_rows, record, shard_file, verify
from rag_mm.memory.writing import changes, stream, writer

CodeReader = Callable[[np.ndarray], np.ndarray]  # See `Memory.code_reader`.


class Memory:
    """One version of a memory, opened for reading; writing later versions does not affect it.

    A row is a document's position in this version. Removing a document shifts the rows of all later
    documents down by one in the next version. Search and read are thread-safe.

    Attributes:
        path: the folder.
        manifest: describes this version.
        ids: the documents' ids in row order.
    """

    def __init__(
        self, path: Path, contents: manifest.MemoryManifest, encoder: model_protocols.Encoder | None
    ):
        """Used by `Memory.open`."""
        self.path = path
        self.manifest = contents
        # The ids first: a stranger's manifest may claim more rows than there are.
        stored = shard_file.load_ids(path, contents)
        self._live = shard_file.load_live(path, contents)
        self.ids = tuple(stored[position] for position in self._live.stored)
        self._encoder = encoder
        self._read_codes: CodeReader | None = None
        self._views = views.Views(path, contents, self._live)
        self._records = shard_file.Records(path, contents.shards)

    @classmethod
    def open(
        cls,
        path: epath.PathLike,
        encoder: model_protocols.Encoder | None = None,
        *,
        version: int | None = None,
    ) -> "Memory":
        """Opens a version after cheap checks: its manifest's digest and the size of every file.

        Args:
            path: the memory's folder.
            encoder: the retriever; without it only vectors can be searched.
            version: an earlier version that was not pruned; the current one if None.

        Raises:
            UserError: there is no such memory or version, a file is missing or has the wrong size, or
                `encoder` is not the retriever that built the memory.
        """
        root = manifest.local_folder(path)
        while True:
            current, sha256 = manifest.read_current(root)
            number = current if version is None else version
            if not 1 <= number <= current:  # The folder of a later version would be unfinished.
                raise UserError(f"{path} has no version {number}; its newest is {current}.")
            try:
                contents = manifest.read(root, number, sha256 if number == current else None)
                manifest.check_sizes(root, contents)
                memory = cls(root, contents, None)
                break
            except UserError:
                # A writer may have published the next version and pruned this one meanwhile.
                if version is not None or manifest.read_current(root)[0] == current:
                    raise
        if encoder is not None:
            memory.attach(encoder)
        return memory

    @classmethod
    def build(
        cls,
        path: epath.PathLike,
        documents: stream.Documents | stream.RecordStream,
        encoder: model_protocols.Encoder,
        tokenizer: model_protocols.ImageTokenizer | None = None,
        *,
        carried: Mapping[str, epath.PathLike] | None = None,
        options: writer.Options | None = None,
    ) -> "Memory":
        """Builds a memory; after a failure or a kill there is no memory at `path`.

        A killed build resumes after its last finished shard when started again with the same documents
        and options.

        Args:
            path: a folder that is not a memory yet.
            documents: with unique ids, read in order. Their images are resized to the tokenizer's image
                size, or to the encoder's if there is no tokenizer.
            encoder: the retriever.
            tokenizer: computes codes of every image and of every frame of a video.
            carried: folders to copy into the memory by name, `retriever` and `tokenizer`, so that
                searching and adding need nothing outside of the memory.
            options: index, batch and shard sizes, progress.

        Raises:
            UserError: no documents, more bad records than the options allow, or a folder that is in use
                or cannot be written.
        """
        folders = {name: Path(folder) for name, folder in (carried or {}).items()}
        root = manifest.local_folder(path)
        writer.build(root, documents, encoder, tokenizer, folders, options or writer.Options())
        return cls.open(path, encoder)

    def add(
        self,
        documents: stream.Documents | stream.RecordStream,
        tokenizer: model_protocols.ImageTokenizer | None = None,
        *,
        options: writer.Options | None = None,
    ) -> "Memory":
        """Writes the next version and returns it opened; this object is unchanged.

        The new rows follow those of the folder's current version, which may be later than this one.

        Raises:
            UserError: as `build`, or the retriever or tokenizer is not the one used by the build.
        """
        encoder = self._need_encoder()
        writer.add(self.path, documents, encoder, tokenizer, options or writer.Options())
        return Memory.open(self.path, encoder)

    def remove(
        self,
        ids: Collection[str] = (),
        urls: Collection[str] = (),
        licenses: Collection[str] = (),
    ) -> "Memory":
        """Removes every document with one of these ids, urls or licenses; returns the next version, opened.

        The rows are only marked as removed (tombstones); `compact` drops them from the files.

        Raises:
            UserError: no document has one of the values; nothing is removed then.
        """
        changes.remove(self.path, ids, urls, licenses)
        return Memory.open(self.path, self._encoder)

    def merge(self, other: "Memory", *, on_progress: changes.Progress | None = None) -> "Memory":
        """Adds the documents of another memory's newest version; returns the next version, opened.

        Raises:
            UserError: the memories differ in retriever, tokenizer or image size, or share an id.
        """
        changes.merge(self.path, other.path, on_progress=on_progress)
        return Memory.open(self.path, self._encoder)

    def compact(
        self, prune: bool = False, *, on_progress: changes.Progress | None = None
    ) -> "Memory":
        """Rewrites the memory without removed documents; returns the next version, opened.

        Args:
            prune: also deletes every earlier version, and with them the removed documents; readers of
                an earlier version then fail.
            on_progress: called with (rows written, total rows).

        Raises:
            UserError: `prune` of a run's own memory, whose later stages read its first version.
        """
        changes.compact(self.path, prune, on_progress=on_progress)
        return Memory.open(self.path, self._encoder)

    def add_codes(
        self,
        tokenizer: model_protocols.ImageTokenizer,
        *,
        on_progress: changes.Progress | None = None,
    ) -> "Memory":
        """Adds an image tokenizer's codes of every picture that lacks them; returns the next version, opened.

        The records are rewritten without the removed ones. The codes are of the stored pictures, scaled to
        the tokenizer's image size.

        Args:
            tokenizer: the memory's own or another.
            on_progress: called with (rows written, total rows).

        Raises:
            UserError: the folder is in use or cannot be written, or a record is damaged.
        """
        changes.add_codes(self.path, tokenizer, on_progress=on_progress)
        return Memory.open(self.path, self._encoder)

    def attach(self, encoder: model_protocols.Encoder) -> None:
        """Sets the retriever used to encode queries.

        Raises:
            UserError: it is not the retriever that built the memory.
        """
        if encoder.fingerprint != self.manifest.encoder:
            raise UserError(
                f"{self.path} was built by another retriever ({self.manifest.encoder[:12]}, not "
                f"{encoder.fingerprint[:12]}): search it with the one that built it."
            )
        self._encoder = encoder

    def attach_codes(self, read: CodeReader) -> None:
        """Sets what `codes` and `read_codes` give, such as codes that are kept outside of the memory."""
        self._read_codes = read

    def carried(self, name: str) -> Path:
        """A model folder that was copied into the memory at build; its files' digests are checked.

        Args:
            name: `retriever` or `tokenizer`.

        Raises:
            UserError: the memory has no such folder, or one of its files was changed.
        """
        manifest.check_folder(self.path, self.manifest, name)
        return self.path / name

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def fingerprint(self) -> str:
        """SHA-256 of rows, models and settings; indexes are excluded because they can differ by machine."""
        return stats.fingerprint(self.manifest, self._live)

    @property
    def codes(self) -> np.ndarray | None:
        """Codes of each row's first picture, int32 [R, N], -1 for a row without one; None without any."""
        return self.read_codes and self.read_codes(np.arange(len(self)))

    @property
    def read_codes(self) -> CodeReader | None:
        """`code_reader` of the image tokenizer that the memory was built with, or what was attached."""
        return self._read_codes or self.code_reader(self.manifest.tokenizer)

    def code_reader(self, tokenizer: str | None) -> CodeReader | None:
        """Maps rows, int [...], to an image tokenizer's codes of their first pictures, int32 [..., N].

        The first picture is the first image or the first frame of a video; -1 for a row without codes. All
        pictures' codes are in `record`.

        Args:
            tokenizer: its fingerprint.

        Returns:
            None if the memory has no codes of this tokenizer.
        """
        if tokenizer is None or self.manifest.codes_per_image(tokenizer) is None:
            return None
        return functools.partial(self._views.codes, tokenizer=tokenizer)

    def embeddings(self, view: str) -> np.ndarray:
        """Unit-length embeddings of a view, float32 [R, D], read-only.

        Raises:
            UserError: there is no such view, or the file is damaged.
        """
        return self._views.embeddings(view)

    def mapped(self, view: str) -> mapped_rows.MappedRows:
        """The embeddings of a view, read where they are asked for; raises as `embeddings`."""
        return self._views.mapped(view)

    def document(self, row: int) -> document_types.Document:
        """The document of a row.

        Raises:
            UserError: there is no such row, or its record is damaged.
        """
        return self.record(row).document

    def record(self, row: int) -> record.Record:
        """The document of a row with its embeddings and every tokenizer's codes; raises as `document`."""
        if not 0 <= row < len(self):
            raise UserError(f"Row {row} is not in a memory of {len(self)} rows.")
        stored = self._records[self._live.stored[row]]
        if stored.document.id != self.ids[row]:
            raise UserError(
                f"Row {row} of {self.path} holds {stored.document.id!r}, but {self.ids[row]!r} is listed: "
                "the memory is damaged."
            )
        return stored

    def encode(
        self,
        *,
        text: str | Sequence[str] | None = None,
        image: image_files.AnyImage | Sequence[image_files.AnyImage] | None = None,
        document: document_types.Document | None = None,
        view: str = "mixed",
    ) -> np.ndarray:
        """Embeds queries: unit-length vectors, float32 [Q, D].

        Args:
            text: one or more texts; cleaned as captions are (`caption_text.clean`).
            image: one image or several, of any size and form that `image_files.to_pixels` takes.
            document: embedded as the memory's documents are, in `view`.
            view: for a document only.

        Raises:
            UserError: no encoder is attached.
        """
        return model_protocols.encode_query(
            self._need_encoder(), text=text, image=image, document=document, view=view
        )

    def search(
        self,
        *,
        text: str | Sequence[str] | None = None,
        image: image_files.AnyImage | Sequence[image_files.AnyImage] | None = None,
        vectors: np.ndarray | None = None,
        document: document_types.Document | None = None,
        view: str | None = None,
        k: int = 5,
    ) -> protocol.Neighbors:
        """The k best rows for each query, without the retrieval policy: a document can find itself.

        Exactly one of `text`, `image`, `vectors` and `document` is given.

        Args:
            text, image: as for `encode`.
            vectors: float32 [Q, D], unit length.
            document: a document, stored in the memory or not.
            view: which embedding is searched; the default is `image` for an image, else `mixed`.
            k: hits per query, 1 to `protocol.MAX_HITS`.

        Returns:
            Memory rows and scores [Q, k].

        Raises:
            UserError: not exactly one query, an unknown view, k out of range, or a damaged index.
        """
        if sum(query is not None for query in (text, image, vectors, document)) != 1:
            raise UserError(
                "A search takes exactly one of a text, an image, a document or vectors."
            )
        view = view or ("image" if image is not None else "mixed")
        model_protocols.check_view(view)
        if not 1 <= k <= protocol.MAX_HITS:
            raise UserError(
                f"A search for k = {k} is not possible; give k from 1 to {protocol.MAX_HITS:,}."
            )
        if vectors is None:
            vectors = self.encode(text=text, image=image, document=document, view=view)
        return self.index(view).search(vectors, k)

    def index(self, view: str) -> protocol.Index:
        """The index of a view, loaded on first use; raises UserError if it is damaged."""
        return self._views.index(view)

    def verify(self) -> list[str]:
        """All problems found in the folder; see `verify.verify`."""
        return verify.verify(self.path)

    def stats(self) -> dict[str, Any]:
        """Sizes, versions, models and the last ingestion's counts as a JSON-ready dict."""
        return stats.summarize(self.path, self.manifest, self._live)

    def caption_hashes(self) -> list[str]:
        """Of each row's text, `shard_file.caption_hash`; empty without text."""
        shards = self.manifest.shards
        origins = (shard_file.load_origins(self.path, self.manifest, shard) for shard in shards)
        stored = [caption for shard in origins for caption in shard.caption]
        return [stored[position] for position in self._live.stored]

    def licenses(self) -> dict[str | None, int]:
        """The number of documents by license, most frequent first; None for documents that name none."""
        return stats.count_licenses(self.path, self.manifest, self._live)

    @property
    def encoder(self) -> model_protocols.Encoder:
        """The retriever; raises UserError if none is attached."""
        return self._need_encoder()

    def _need_encoder(self) -> model_protocols.Encoder:
        if self._encoder is None:
            raise UserError(f"{self.path} was opened without its retriever: attach one.")
        return self._encoder
