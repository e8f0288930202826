"""Documents in ArrayRecord files: records in this project's format, and TFDS datasets."""

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

REJECT_REASONS = {"damaged-record": "a record whose bytes were changed"}


def write_documents(path: pathlib.Path, documents: Iterable[document_types.Document]) -> int:
    """Writes documents to an ArrayRecord file, atomically; returns their number.

    Images are stored as PNG, in their original size.
    """
    count = 0
    with (
        files.whole_file(path) as temporary,
        contextlib.closing(
            array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        ) as writer,
    ):
        for document in documents:
            writer.write(record.to_bytes(record.Record(document, {})))
            count += 1
    return count


class ArrayRecordSource:
    """Records of ArrayRecord files, written by `write_documents` or by a memory, in file order."""

    def __init__(self, paths: Sequence[pathlib.Path]):
        """Opens the files.

        Raises:
            UserError: there are no files, or one is not an ArrayRecord file.
        """
        if not paths:
            raise UserError("There are no ArrayRecord files to read.")
        self._records = _open([str(path) for path in sorted(paths)])
        self.size: int | None = len(self._records)
        described = [[path.name, path.stat().st_size] for path in sorted(paths)]
        self.fingerprint = files.digest(files.canonical_json(described).encode())

    def read(self, start: int) -> Iterator[stream.Item]:
        """All records from number `start` on."""
        for i in range(start, len(self._records)):
            try:
                document = record.from_bytes(self._records[i]).document
                if len(document.text) > captions.MAX_TEXT_BYTES:
                    raise UserError(f"its text has {len(document.text):,} characters.")
                yield stream.Item(i + 1, document)
            except (RuntimeError, UserError) as error:  # RuntimeError: ArrayRecord's checksum.
                reject = stream.Reject(f"record {i}", "damaged-record", f"cannot be read: {error}")
                yield stream.Item(i + 1, reject=reject)


class TfdsSource:
    """A TFDS dataset in ArrayRecord format, with one image and its caption per record; needs no TensorFlow.

    Document ids are `NAME-SPLIT-NUMBER`. Images are read as the encoded files that TFDS stores, so that their
    headers are checked before they are decoded.
    """

    def __init__(self, name: str, split: str, image: str | None = None, caption: str | None = None):
        """Opens a dataset.

        Args:
            name: a dataset that TFDS has prepared in its data folder, or a dataset's folder.
            split: a split or slice, such as `train` or `train[:100]`.
            image: path of the image feature; if None, the dataset's only image feature.
            caption: path of the caption, a text or a label, with `/` between nested features; if None,
                the first of `caption`, `text`, `captions` and `label` that exists.

        Raises:
            UserError: no such dataset, split or feature, or not in ArrayRecord format.
        """
        self._features, self._records = open_tfds(name, split)
        self._name = f"{pathlib.PurePath(name).name}-{split}"
        self._image = image or only_image(self._features)
        self._caption = caption or _first_caption(self._features)
        self.size: int | None = len(self._records)
        self.fingerprint = files.digest(f"{name} {split} {image} {caption} {self.size}".encode())

    def read(self, start: int) -> Iterator[stream.Item]:
        """All records from number `start` on."""
        for i in range(start, len(self._records)):
            name = f"{self._name}-{i}"
            try:
                yield self._item(i + 1, name, self._records[i])
            except (captions.BadRecord, image_decoding.BadImage) as error:
                bad = captions.BadRecord(error.reason, str(error))
                yield stream.Item(i + 1, reject=bad.as_reject(name))

    def _item(self, position: int, name: str, fields: Any) -> stream.Item:
        text = self._text(get_feature(fields, self._caption))
        sidecar = captions.check({"caption": text}, name)
        image = image_decoding.decode(get_feature(fields, self._image), min_pixels=2)
        segments = (document_types.Text(sidecar.caption), document_types.Image(image.pixels))
        return stream.Item(position, document_types.Document(name, segments), notes=image.notes)

    def _text(self, value: Any) -> str:
        """A text, the first of several, or a label's name."""
        if isinstance(value, list | tuple | np.ndarray) and np.ndim(value):
            value = value[0] if len(value) else b""
        if isinstance(value, bytes):
            return captions.decode_text(value)
        feature = get_feature(self._features, self._caption)
        return feature.int2str(int(value)) if hasattr(feature, "int2str") else str(value)


def _open(paths: Sequence[str]) -> array_record_data_source.ArrayRecordDataSource:
    for path in paths:
        if files.is_special(path):
            raise UserError(f"{path} is a device or a pipe, not an ArrayRecord file.")
    try:
        source = array_record_data_source.ArrayRecordDataSource(list(paths))
        len(source)
        return source
    except (RuntimeError, ValueError, OSError) as error:
        many = f"One of {len(paths)} files, {paths[0]} to {paths[-1]},"
        name = paths[0] if len(paths) == 1 else many
        raise UserError(f"{name} is not an ArrayRecord file ({_reason(error)}).") from error


def open_tfds(name: str, split: str) -> tuple[Any, Any]:
    """The features of a dataset and its records, with images as encoded bytes.

    Raises:
        UserError: TFDS cannot read it, or its records do not have exactly one image.
    """
    import tensorflow_datasets as tfds  # Imported here because it takes seconds.

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
    except Exception as error:  # Dataset builders raise many types of errors.
        raise UserError(
            f"TFDS cannot read {name!r}, split {split!r}, in ArrayRecord format: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error's message, or its repr if the message is empty."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def only_image(features: Any) -> str:
    """The path of the only image feature, joined by `/`; raises UserError if there is not exactly one."""
    paths = [path for path, kind in _leaves(features) if kind == "Image"]
    if len(paths) != 1:
        raise UserError(f"The dataset has {len(paths)} image features ({paths}); it must have one.")
    return paths[0]


def _first_caption(features: Any) -> str:
    paths = dict(_leaves(features))
    for name in ("caption", "text", "captions", "label"):
        for path, kind in paths.items():
            if name in path.split("/") and kind in ("Text", "ClassLabel"):
                return path
    raise UserError(f"The dataset has no caption, text or label among {sorted(paths)}.")


def _leaves(features: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Path and type name of every feature."""
    inner = getattr(features, "feature", features)  # A sequence wraps its element.
    if hasattr(inner, "items"):
        for name, feature in inner.items():
            yield from _leaves(feature, f"{prefix}{name}/")
    else:
        yield prefix.rstrip("/"), type(inner).__name__


def get_feature(fields: Any, path: str) -> Any:
    """The value at a `/`-separated path of nested features."""
    for part in path.split("/"):
        fields = getattr(fields, "feature", fields)
        fields = fields[part]
    return getattr(fields, "feature", fields)
