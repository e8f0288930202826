"""Documents from an untrusted folder of images, described by the lines of captions.jsonl."""

import contextlib
import os
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import document_types, files
from rag_mm.core.errors import UserError
from rag_mm.data import captions, document_json, file_names, image_decoding
from rag_mm.memory.writing import stream

CAPTIONS = "captions.jsonl"


def load_image(path: epath.PathLike, composite_on_white: bool = True) -> np.ndarray:
    """Reads a JPEG, PNG or WebP image as uint8 [H, W, 3], rotated as its EXIF data says.

    The format is detected from the content, not the file name. Transparent pixels are blended with white, or
    with `composite_on_white` False lose their alpha, as for public CLIPs. CMYK, grayscale, palette, 1-bit and
    16-bit images are converted to RGB; of an animation the first frame is read.

    Raises:
        UserError: the file is missing, damaged or not such an image, or its header claims more than
            `image_files.MAX_PIXELS` pixels.
    """
    try:
        return image_decoding.decode(
            read_file(epath.Path(path)), composite_on_white=composite_on_white
        ).pixels
    except UserError as error:
        raise UserError(f"Image {path} {error}") from None


def read_file(path: epath.Path) -> bytes:
    """The bytes of a regular file; devices and pipes are rejected because reading them might never end.

    Raises:
        BadRecord: it cannot be read.
        BadImage: it has more than `image_decoding.MAX_BYTES` bytes.
    """
    try:
        if files.is_special(path):  # epath treats a pipe as a file.
            raise captions.BadRecord("device", "cannot be read: it is a device or a pipe.")
        if path.is_file() and _size(path) > image_decoding.MAX_BYTES:
            raise image_decoding.BadImage(
                "too-many-bytes",
                f"has more than {image_decoding.MAX_BYTES:,} bytes; scale it down.",
            )
        return path.read_bytes()
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}."
        raise captions.BadRecord("missing-picture", reason) from error


def read_inside(directory: epath.Path, name: str) -> tuple[bytes, str]:
    """The bytes and the ending of a file of an untrusted folder.

    Raises:
        BadRecord: the name, or a link, leads outside of the folder, or the file cannot be read.
        BadImage: it has more than `image_decoding.MAX_BYTES` bytes.
    """
    captions.check_path(name)
    path = _find(directory, name)
    if _leads_outside(directory, path):
        raise captions.BadRecord(
            "leads-outside",
            "is a link that leads outside of the folder; copy the file into it.",
        )
    return read_file(path), path.suffix.removeprefix(".")


def _size(path: epath.Path) -> int:
    # epath looks up the owner's name, which containers often do not know.
    return path.stat().length if "://" in os.fspath(path) else os.stat(path).st_size


class FolderSource:
    """The records of a folder in the order of captions.jsonl.

    A line is `{"image": "file.png", "caption": "...", "url": "...", "license": "..."}`, the last two
    optional: a text and an image. The document's id is the image's path without its ending
    (`file_names.ids_of_paths`). Or a line is a document of any segments, with an id of its own
    (`document_json`).
    """

    def __init__(self, directory: epath.PathLike):
        """Reads captions.jsonl, but no image.

        Raises:
            UserError: the folder or its captions.jsonl does not exist.
        """
        self._directory = epath.Path(directory)
        self._lines = _read_lines(self._directory)
        self.size: int | None = len(self._lines)
        self._ids = _ids(self._lines)
        self.fingerprint = files.digest(b"\n".join(self._lines) + _describe(self._ids))

    def read(self, start: int) -> Iterator[stream.Item]:
        """Items from line `start` on; empty lines are not counted."""
        for i in range(start, len(self._lines)):
            name = f"line {i + 1}"
            try:
                fields = captions.parse_json(self._lines[i])
                if document_json.has_segments(fields):
                    name = document_json.name_of(fields) or name
                    document, notes = document_json.parse(fields, self._read)
                    yield stream.Item(i + 1, document, notes=notes)
                else:
                    sidecar = _check(fields)
                    name = fields["image"]
                    yield self._item(i, fields["image"], sidecar)
            except (captions.BadRecord, image_decoding.BadImage) as error:
                bad = captions.BadRecord(error.reason, str(error))
                yield stream.Item(i + 1, reject=bad.as_reject(name))

    def name(self, i: int) -> str:
        """The image file, or the id, that line `i` gives, which must be valid."""
        fields = captions.parse_json(self._lines[i])
        return document_json.name_of(fields) or fields["image"]

    def _read(self, name: str) -> tuple[bytes, str]:
        return read_inside(self._directory, name)

    def _item(self, line: int, name: str, sidecar: captions.SidecarCaption) -> stream.Item:
        image = image_decoding.decode(*self._read(name), min_pixels=2)
        segments = (document_types.Text(sidecar.caption), document_types.Image(image.pixels))
        document = document_types.Document(self._ids[line], segments, sidecar.url, sidecar.license)
        return stream.Item(line + 1, document, notes=image.notes)

    def __repr__(self) -> str:
        return f"FolderSource({str(self._directory)!r}, {self.size} lines)"


class FolderDocuments:
    """The good records of a folder, with random access; see `FolderSource`.

    Every image is decoded once when the folder is opened, so that every listed record can be read.

    Attributes:
        rejects: (name, reason) of each bad record; the name is the image file's, the id, or `line 3`.
    """

    def __init__(
        self, directory: epath.PathLike, on_progress: Callable[[int, int], None] | None = None
    ):
        """Reads the captions and checks every image.

        Args:
            directory: the folder.
            on_progress: called with (lines checked, total lines).

        Raises:
            UserError: the folder or its captions.jsonl does not exist, or it has no good record.
        """
        self._source = FolderSource(directory)
        self._positions: list[int] = []
        self.rejects: list[tuple[str, str]] = []
        seen: set[str] = set()
        for item in self._source.read(0):
            if item.reject is not None:
                self.rejects.append((item.reject.name, item.reject.detail))
            elif item.document is not None and item.document.id in seen:
                name = self._source.name(item.position - 1)
                reason = f"has the id {item.document.id!r} of an earlier record."
                self.rejects.append((name, reason))
            elif item.document is not None:
                seen.add(item.document.id)
                self._positions.append(item.position - 1)
            if on_progress is not None:
                on_progress(item.position, self._source.size or 0)
        if not self._positions:
            name, reason = self.rejects[0] if self.rejects else (CAPTIONS, "is empty.")
            raise UserError(
                f"{directory} has no good record; the first of {len(self.rejects)} bad ones is "
                f"{name}, which {reason}"
            )

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, i: int) -> document_types.Document:
        """The i-th good record, with its pictures in their original size."""
        item = next(self._source.read(self._positions[i]))
        if item.document is None:
            raise UserError(f"Record {i} of {self._source} was changed: {item.reject}.")
        return item.document

    def __repr__(self) -> str:
        return f"FolderDocuments({self._source}, {len(self)} good)"


def _find(directory: epath.Path, name: str) -> epath.Path:
    """The path of an image; disks may hold its name in another Unicode form than the captions do."""
    forms = [name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]
    return next(
        (path for path in map(directory.joinpath, forms) if path.exists()), directory / name
    )


def _leads_outside(directory: epath.Path, path: epath.Path) -> bool:
    """Whether links make a path inside of a local folder name a file that is not: a stranger's folder could
    otherwise copy any image of this machine into a memory."""
    if "://" in os.fspath(directory):
        return False
    root = os.path.realpath(directory)
    return not os.path.realpath(path).startswith(os.path.join(root, ""))


def _read_lines(directory: epath.Path) -> list[bytes]:
    if not directory.exists():
        raise UserError(f"{directory} is not a folder: it does not exist.")
    if not directory.is_dir():
        raise UserError(f"{directory} is not a folder of images with a {CAPTIONS}.")
    path = directory / CAPTIONS
    if files.is_special(path):
        raise UserError(f"{path} is a device or a pipe; it must be a file.")
    if _leads_outside(directory, path):
        raise UserError(
            f"{path} is a link that leads outside of the folder; copy the file into it."
        )
    try:
        data = path.read_bytes()
    except OSError:
        raise UserError(
            f"{directory / CAPTIONS} cannot be read; it holds one "
            '{"image", "caption"} or {"id", "segments"} per line.'
        ) from None
    return [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]


def _ids(lines: list[bytes]) -> list[str]:
    """The id of each line's document, empty for bad lines and for documents with an id of their own."""
    names = {}
    for i, line in enumerate(lines):
        with contextlib.suppress(captions.BadRecord):
            fields = captions.parse_json(line)
            if not document_json.has_segments(fields):
                _check(fields)
                names[i] = fields["image"]
    ids = dict(zip(names, file_names.ids_of_paths(names.values()), strict=True))
    return [ids.get(i, "") for i in range(len(lines))]


def _describe(ids: list[str]) -> bytes:
    """What a fingerprint adds where ids are more than a file's name, which once all were."""
    return b"\nids are paths" if any("/" in name for name in ids) else b""


def _check(fields: Any) -> captions.SidecarCaption:
    """Checks a line of an image and its caption; error messages lack the subject of their sentence."""
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
        raise captions.BadRecord(
            "not-json",
            'is not {"image": "file.png", "caption": "..."} or {"id": "..", "segments": [..]}.',
        )
    captions.check_path(fields["image"])
    return captions.check(fields, fields["image"])
