"""Documents in ArrayRecord files: our own records, and TFDS datasets kept in that form."""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_data_source, array_record_module

from rag_mm.core import document_types, files
from rag_mm.core.errors import UserError
from rag_mm.data import captions, image_decoding
from rag_mm.memory.store import record
from rag_mm.memory.writing import stream

REFUSALS = {"damaged-record": "a record whose bytes are not those that were written"}


def write_documents(path: pathlib.Path, documents: Iterable[document_types.Document]) -> int:
    """Writes an ArrayRecord file, whole or not at all; how many documents it holds.

    Pictures are kept as PNG, in the size they have.
    """
    temporary = path.with_name(f".{path.name}.part")
    count = 0
    try:
        with contextlib.closing(
            array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        ) as writer:
            for found in documents:
                writer.write(record.to_bytes(record.Record(found, {})))
                count += 1
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


class RecordSource:
    """Records of ArrayRecord files, those of `write_documents` or of a memory, in file order."""

    def __init__(self, paths: Sequence[pathlib.Path]):
        """Opens the files.

        Raises:
            UserError: no file, or one that is no ArrayRecord file.
        """
        if not paths:
            raise UserError("There are no ArrayRecord files to read.")
        self._records = _open([str(path) for path in sorted(paths)])
        self.size: int | None = len(self._records)
        described = [[path.name, path.stat().st_size] for path in sorted(paths)]
        self.fingerprint = files.digest(files.canonical_json(described).encode())

    def read(self, start: int) -> Iterator[stream.Item]:
        """All records from number `start` on."""
        for place in range(start, len(self._records)):
            try:
                found = record.from_bytes(self._records[place]).document
                yield stream.Item(place + 1, found)
            except (RuntimeError, UserError) as error:  # RuntimeError: ArrayRecord's own checksum.
                bad = stream.Reject(f"record {place}", "damaged-record", f"cannot be read: {error}")
                yield stream.Item(place + 1, reject=bad)


class TfdsSource:
    """A TFDS dataset in ArrayRecord form, without TensorFlow: one picture and its caption a record.

    The id is `NAME-SPLIT-NUMBER`. Pictures come as the files that TFDS keeps, so that their headers are
    checked before anything is decoded.
    """

    def __init__(self, name: str, split: str, image: str | None = None, caption: str | None = None):
        """Opens a dataset.

        Args:
            name: a dataset that TFDS has prepared in its data folder, or the folder of one.
            split: such as `train`, or `train[:100]`.
            image: the feature that holds the picture; the only one of that kind if None.
            caption: the feature that holds the caption, a text or a label, `/` leading into nested
                ones; `caption`, `text`, `captions` or `label`, whichever is first there, if None.

        Raises:
            UserError: no such dataset, split or feature, or one in another form.
        """
        self._features, self._records = open_tfds(name, split)
        self._name = f"{pathlib.PurePath(name).name}-{split}"
        self._image = image or only_image(self._features)
        self._caption = caption or _first_caption(self._features)
        self.size: int | None = len(self._records)
        self.fingerprint = files.digest(f"{name} {split} {image} {caption} {self.size}".encode())

    def read(self, start: int) -> Iterator[stream.Item]:
        """All records from number `start` on."""
        for place in range(start, len(self._records)):
            name = f"{self._name}-{place}"
            try:
                yield self._item(place + 1, name, self._records[place])
            except (captions.BadRecord, image_decoding.BadPicture) as error:
                bad = captions.BadRecord(error.reason, str(error))
                yield stream.Item(place + 1, reject=bad.as_reject(name))

    def _item(self, position: int, name: str, fields: Any) -> stream.Item:
        text = self._text(walk(fields, self._caption))
        beside = captions.check({"caption": text}, name)
        picture = image_decoding.decode(walk(fields, self._image), min_pixels=2)
        segments = (document_types.Text(beside.caption), document_types.Image(picture.pixels))
        return stream.Item(position, document_types.Document(name, segments), notes=picture.notes)

    def _text(self, value: Any) -> str:
        """A text, the first of several, or a label's name."""
        if isinstance(value, list | tuple | np.ndarray) and np.ndim(value):
            value = value[0] if len(value) else b""
        if isinstance(value, bytes):
            return captions.decode_text(value)
        feature = walk(self._features, self._caption)
        return feature.int2str(int(value)) if hasattr(feature, "int2str") else str(value)


def _open(paths: Sequence[str]) -> array_record_data_source.ArrayRecordDataSource:
    try:
        source = array_record_data_source.ArrayRecordDataSource(list(paths))
        len(source)
        return source
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{paths[0]} or one beside it is no ArrayRecord file ({_reason(error)})."
        ) from error


def open_tfds(name: str, split: str) -> tuple[Any, Any]:
    """The features of a dataset and its records, pictures as the bytes that TFDS keeps.

    Raises:
        UserError: TFDS cannot read it, or it has not exactly one picture a record.
    """
    import tensorflow_datasets as tfds  # Takes seconds, which nobody else should wait for.

    try:
        folder = pathlib.Path(name)
        builder = tfds.builder_from_directory(folder) if folder.is_dir() else tfds.builder(name)
        image = only_image(builder.info.features)
        decoders: Any = tfds.decode.SkipDecoding()
        for part in reversed(image.split("/")):
            decoders = {part: decoders}
        return builder.info.features, builder.as_data_source(split, decoders=decoders)
    except UserError:
        raise
    except Exception as error:  # Every builder fails in its own way.
        raise UserError(
            f"TFDS cannot read {name!r}, split {split!r}, in ArrayRecord form: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what an error says, which may be nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def only_image(features: Any) -> str:
    """The path of the one picture, parts joined by `/`; raises UserError where there is not one."""
    found = [path for path, kind in _leaves(features) if kind == "Image"]
    if len(found) != 1:
        raise UserError(f"The dataset has the pictures {found}: it should have one.")
    return found[0]


def _first_caption(features: Any) -> str:
    paths = dict(_leaves(features))
    for wanted in ("caption", "text", "captions", "label"):
        for path, kind in paths.items():
            if wanted in path.split("/") and kind in ("Text", "ClassLabel"):
                return path
    raise UserError(f"The dataset has no caption, text or label among {sorted(paths)}.")


def _leaves(features: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Path and kind of every feature."""
    inner = getattr(features, "feature", features)  # A sequence wraps its element.
    if hasattr(inner, "items"):
        for name, feature in inner.items():
            yield from _leaves(feature, f"{prefix}{name}/")
    else:
        yield prefix.rstrip("/"), type(inner).__name__


def walk(fields: Any, path: str) -> Any:
    """What lies at a path of nested features."""
    for part in path.split("/"):
        fields = getattr(fields, "feature", fields)
        fields = fields[part]
    return getattr(fields, "feature", fields)
