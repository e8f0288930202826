"""Documents in untrusted Parquet files: a caption and its image per row, as on the Hugging Face Hub."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rag_mm.core import document_types, files
from rag_mm.core.errors import UserError
from rag_mm.data import captions, image_decoding
from rag_mm.memory.writing import stream

REJECT_REASONS = {"damaged-parquet": "rows of a Parquet file that cannot be read"}
# The first of these columns that a file has.
_CAPTIONS = ("caption", "text", "TEXT", "txt")
_IMAGES = ("image", "jpg", "jpeg", "png", "webp")
_IDS = ("id", "key", "__key__")
_URLS = ("url", "URL")
_ROWS_AT_ONCE = 64
# Arrow's errors are among them.
_ERRORS = (OSError, ValueError, KeyError, TypeError, NotImplementedError, MemoryError)


class ParquetSource:
    """The rows of Parquet files, in order of the files' names.

    A file has a column `caption` or `text`, and may have `image`, with the bytes of an image file or, as on
    the Hub, a struct with `bytes`; a file without it gives documents of a text alone. `id`, `url` and
    `license` are optional; without ids a document is named by its file and row, as `train-00001/17`.
    """

    def __init__(self, paths: Sequence[pathlib.Path]):
        """Reads the footers.

        Raises:
            UserError: there are no files, or one is damaged or has no column of captions.
        """
        if not paths:
            raise UserError("There are no Parquet files to read.")
        self._files = [_ParquetFile(path) for path in sorted(paths)]
        self.size: int | None = sum(file.num_rows for file in self._files)
        described = [[f.path.name, f.path.stat().st_size, f.num_rows] for f in self._files]
        self.fingerprint = files.digest(files.canonical_json(described).encode())

    def read(self, start: int) -> Iterator[stream.Item]:
        """Items from row `start` on, counted over all files; row groups before it are not read."""
        before = 0
        for file in self._files:
            if start < before + file.num_rows:
                yield from file.read(before, max(0, start - before))
            before += file.num_rows


class _ParquetFile:
    """One file, opened for each reading, so that threads share nothing."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        files.refuse_special(path)
        file = self._open()
        self.num_rows = file.metadata.num_rows
        self._groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        names = file.schema_arrow.names
        file.close()
        self._columns = {
            key: next((name for name in wanted if name in names), None)
            for key, wanted in (
                ("caption", _CAPTIONS),
                ("image", _IMAGES),
                ("id", _IDS),
                ("url", _URLS),
                ("license", ("license",)),
            )
        }
        if self._columns["caption"] is None:
            raise UserError(
                f"{path} has no column of captions; name one of its columns {_CAPTIONS[0]} or {_CAPTIONS[1]}."
            )

    def read(self, before: int, start: int) -> Iterator[stream.Item]:
        """Items from row `start` on; `before` rows are in earlier files."""
        first = 0
        file = self._open()
        for group, num_rows in enumerate(self._groups):
            if start < first + num_rows:
                yield from self._read_group(file, group, before, first, start)
            first += num_rows
        file.close()

    def _read_group(
        self, file: Any, group: int, before: int, first: int, start: int
    ) -> Iterator[stream.Item]:
        row, end = first, first + self._groups[group]
        try:
            for fields in self._rows(file, group):
                if row >= start:
                    yield self._item(before, row, fields)
                row += 1
        except _ERRORS as error:
            reason = f"rows {row} to {end - 1} cannot be read ({str(error).splitlines()[0][:200]})."
            reject = stream.Reject(f"{self.path.name}/{row}", "damaged-parquet", reason)
            yield stream.Item(before + end, reject=reject)

    def _rows(self, file: Any, group: int) -> Iterator[Mapping[str, Any]]:
        wanted = [name for name in self._columns.values() if name is not None]
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=wanted):
            for values in batch.to_pylist():
                yield {key: values[n] for key, n in self._columns.items() if n is not None}

    def _item(self, before: int, row: int, fields: Mapping[str, Any]) -> stream.Item:
        position, name = before + row + 1, f"{self.path.stem}/{row}"
        try:
            if fields.get("id") is not None:
                name = str(fields["id"])
            text = {key: fields[key] for key in ("caption", "url", "license") if key in fields}
            sidecar = captions.check(text, name)
            segments: tuple[document_types.Segment, ...] = (document_types.Text(sidecar.caption),)
            notes: tuple[str, ...] = ()
            if self._columns["image"] is not None:
                image = image_decoding.decode(_bytes(fields["image"]), min_pixels=2)
                segments, notes = (*segments, document_types.Image(image.pixels)), image.notes
            document = document_types.Document(name, segments, sidecar.url, sidecar.license)
            return stream.Item(position, document, notes=notes)
        except (captions.BadRecord, image_decoding.BadImage) as error:
            bad = captions.BadRecord(error.reason, str(error))
            return stream.Item(position, reject=bad.as_reject(name))

    def _open(self) -> Any:
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self.path)
        except _ERRORS as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.path} is not a readable Parquet file ({reason}).") from error


def _bytes(value: Any) -> bytes:
    """The image file in a cell: bytes, or a struct with them."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise captions.BadRecord("missing-picture", "holds no bytes of an image.")
    return data
