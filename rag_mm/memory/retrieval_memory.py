"""The memory: documents, their embeddings and codes, and an index over each view of them."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import document_types
from rag_mm.core.errors import UserError
from rag_mm.memory import model_protocols, stats, views
from rag_mm.memory.index import protocol
from rag_mm.memory.store import manifest, record, shard_file, verify
from rag_mm.memory.writing import changes, stream, writer


class Memory:
    """One version of a memory, opened for reading; later versions do not disturb it.

    A row is a document's place among those that are there; when one is removed, the rows of the later
    ones close up in the version without it. Safe to search and read from several threads. Attributes:
        path: the folder.
        manifest: what this version is.
        ids: the documents' ids in row order.
    """

    def __init__(
        self, path: Path, contents: manifest.MemoryManifest, encoder: model_protocols.Encoder | None
    ):
        """For `Memory.open`."""
        self.path = path
        self.manifest = contents
        self._live = shard_file.load_live(path, contents)
        stored = shard_file.load_ids(path, contents)
        self.ids = tuple(stored[place] for place in self._live.stored)
        self._encoder = encoder
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
            version: an earlier version that still lies there; the current one if None.

        Raises:
            UserError: no memory or version there, a file missing or of another size, or another
                retriever than the one that built it.
        """
        root = manifest.local_folder(path)
        while True:
            current, sha256 = manifest.read_current(root)
            wanted = current if version is None else version
            if not 1 <= wanted <= current:  # A later one may lie there, but was never finished.
                raise UserError(f"{path} has no version {wanted}; its newest is {current}.")
            try:
                contents = manifest.read(root, wanted, sha256 if wanted == current else None)
                manifest.check_sizes(root, contents)
                memory = cls(root, contents, None)
                break
            except UserError:
                # A writer may have made the next version and pruned this one meanwhile.
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
        """Makes a memory; a failure or a kill leaves none.

        Started again after a kill, with the same documents and options, it goes on behind the last
        shard that was finished.

        Args:
            path: a folder that is not a memory yet.
            documents: with unique ids, read one after the other; their pictures are fitted to the
                tokenizer's image size, or the encoder's without one.
            encoder: the retriever.
            tokenizer: gives codes to each document with an image.
            carried: folders to copy into the memory by name, `retriever` and `tokenizer`, so that
                it needs nothing else to be searched and added to.
            options: index, batch and shard sizes, progress.

        Raises:
            UserError: no documents, more bad ones than the options allow, a folder that is in use
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
        """Writes the next version, opened; this one stays as it is.

        The rows follow those of the folder's current version, which may be later than this one.

        Raises:
            UserError: as `build`, or another retriever or tokenizer than the build's.
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
        """Writes the next version, opened, without every document that one of these names.

        Nothing is moved: the rows are marked, and `compact` leaves them behind.

        Raises:
            UserError: a name that no document has; nothing is removed then.
        """
        changes.remove(self.path, ids, urls, licenses)
        return Memory.open(self.path, self._encoder)

    def merge(self, other: "Memory", *, on_progress: changes.Progress | None = None) -> "Memory":
        """Writes the next version, opened, with the documents of another memory's newest version.

        Raises:
            UserError: another retriever, tokenizer or picture size, or an id that both have.
        """
        changes.merge(self.path, other.path, on_progress=on_progress)
        return Memory.open(self.path, self._encoder)

    def compact(
        self, prune: bool = False, *, on_progress: changes.Progress | None = None
    ) -> "Memory":
        """Writes the next version, opened, in files that hold nothing but its own rows.

        Args:
            prune: deletes every earlier version, with what was removed from them; who has one of
                these open then reads no further.
            on_progress: called with (rows written, all rows).

        Raises:
            UserError: `prune` of a run's own memory, whose later stages read its first version.
        """
        changes.compact(self.path, prune, on_progress=on_progress)
        return Memory.open(self.path, self._encoder)

    def attach(self, encoder: model_protocols.Encoder) -> None:
        """Gives the memory its retriever.

        Raises:
            UserError: it is not the one that built the memory.
        """
        if encoder.fingerprint != self.manifest.encoder:
            raise UserError(
                f"{self.path} was built by another retriever ({self.manifest.encoder[:12]}, not "
                f"{encoder.fingerprint[:12]}): search it with its own."
            )
        self._encoder = encoder

    def carried(self, name: str) -> Path:
        """A folder that was copied in at build, its files held against their digests.

        Args:
            name: `retriever` or `tokenizer`.

        Raises:
            UserError: the memory carries none of that name, or a file of it was changed.
        """
        manifest.check_folder(self.path, self.manifest, name)
        return self.path / name

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def fingerprint(self) -> str:
        """Digest of the rows and what made them; indexes, which may differ by machine, aside."""
        return stats.fingerprint(self.manifest, self._live)

    @property
    def codes(self) -> np.ndarray | None:
        """Codes of each row's first image, int32 [R, N], -1 where it has none; None without any."""
        return self._views.codes()

    def embeddings(self, view: str) -> np.ndarray:
        """Unit rows of a view, float32 [R, D], read-only.

        Raises:
            UserError: there is no such view, or the file is damaged.
        """
        return self._views.embeddings(view)

    def document(self, row: int) -> document_types.Document:
        """The document of a row.

        Raises:
            UserError: there is no such row, or its record is damaged.
        """
        return self.record(row).document

    def record(self, row: int) -> record.Record:
        """The document of a row with its embeddings and codes; raises as `document`."""
        if not 0 <= row < len(self):
            raise UserError(f"Row {row} is not in a memory of {len(self)} rows.")
        found = self._records[self._live.stored[row]]
        if found.document.id != self.ids[row]:
            raise UserError(f"Row {row} of {self.path} is not {self.ids[row]!r} as listed.")
        return found

    def encode(
        self,
        *,
        text: str | Sequence[str] | None = None,
        image: np.ndarray | None = None,
        document: document_types.Document | None = None,
        view: str = "mixed",
    ) -> np.ndarray:
        """Queries as unit rows, float32 [Q, D].

        Args:
            text: one or more texts.
            image: uint8 [(Q,) H, W, 3].
            document: embedded as the memory's own are, in `view`.
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
        image: np.ndarray | None = None,
        vectors: np.ndarray | None = None,
        document: document_types.Document | None = None,
        view: str | None = None,
        k: int = 5,
    ) -> protocol.Neighbors:
        """The k best rows for each query; no policy applies, so a document may find itself.

        Args:
            text: one text or several.
            image: uint8 [H, W, 3] or [Q, H, W, 3], of any size.
            vectors: float32 [Q, D] unit rows.
            document: one, of the memory or not. Exactly one of the four is given.
            view: which embedding is searched; `image` for an image, else `mixed`.
            k: hits of each query, >= 1.

        Returns:
            Row numbers and scores [Q, k].

        Raises:
            UserError: not exactly one query, no such view, k < 1, or a damaged index.
        """
        if sum(query is not None for query in (text, image, vectors, document)) != 1:
            raise UserError(
                "A search takes exactly one of a text, an image, a document or vectors."
            )
        view = view or ("image" if image is not None else "mixed")
        model_protocols.check_view(view)
        if k < 1:
            raise UserError(f"A search for k = {k} finds nothing; ask for at least 1 neighbor.")
        if vectors is None:
            vectors = self.encode(text=text, image=image, document=document, view=view)
        return self.index(view).search(vectors, k)

    def index(self, view: str) -> protocol.Index:
        """The index of a view, loaded on first use; raises UserError where it is damaged."""
        return self._views.index(view)

    def verify(self) -> list[str]:
        """Everything that is wrong with the folder; see `verify.verify`."""
        return verify.verify(self.path)

    def stats(self) -> dict[str, Any]:
        """What the memory holds, ready for JSON."""
        return stats.summarize(self.path, self.manifest, self._live)

    @property
    def encoder(self) -> model_protocols.Encoder:
        """The retriever; raises UserError where none is attached."""
        return self._need_encoder()

    def _need_encoder(self) -> model_protocols.Encoder:
        if self._encoder is None:
            raise UserError(f"{self.path} was opened without its retriever: attach one.")
        return self._encoder
