"""Documents from a folder of pictures and their captions, which a stranger may have made."""

import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from rag_mm.core import document_types, files
from rag_mm.core.errors import UserError
from rag_mm.data import captions, image_decoding
from rag_mm.memory.writing import stream

CAPTIONS = "captions.jsonl"


def load_image(path: epath.PathLike, is_whitened: bool = True) -> np.ndarray:
    """Reads a JPEG, PNG or WebP picture as uint8 [H, W, 3], turned as its EXIF data says.

    The content decides, not the ending. Transparent parts become white, or with `is_whitened` False show
    whatever colour lies below, as to public CLIPs; CMYK, grey, palette, 1-bit and 16-bit pictures become
    RGB; of an animation comes the first frame.

    Raises:
        UserError: there is no such file, it is no such picture or a damaged one, or it has more
            than `images.MAX_PIXELS`, which its header tells before anything is decoded.
    """
    try:
        return image_decoding.decode(read_file(epath.Path(path)), is_whitened=is_whitened).pixels
    except UserError as error:
        raise UserError(f"Picture {path} {error}") from None


def read_file(path: epath.Path) -> bytes:
    """The bytes of a regular file; a device or a pipe would never end.

    Raises:
        BadRecord: it cannot be read.
    """
    try:
        # The path library takes a pipe for a file; a remote store has no pipes.
        if "://" not in os.fspath(path):
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise captions.BadRecord("device", "cannot be read: it is a device or a pipe.")
        if path.is_file() and path.stat().length > image_decoding.MAX_BYTES:
            raise image_decoding.BadPicture(
                "too-many-bytes",
                f"has more than {image_decoding.MAX_BYTES:,} bytes; scale it down.",
            )
        return path.read_bytes()
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}."
        raise captions.BadRecord("missing-picture", reason) from error


class FolderSource:
    """The records of a folder in the order of captions.jsonl, each a caption and a picture.

    A line is `{"image": "file.png", "caption": "...", "url": "...", "license": "..."}`, the last
    two optional; the document's id is the picture's file name without its ending.
    """

    def __init__(self, directory: epath.PathLike):
        """Reads the captions alone.

        Raises:
            UserError: no folder, or no captions.jsonl in it.
        """
        self._directory = epath.Path(directory)
        self._lines = _read_lines(self._directory)
        self.size: int | None = len(self._lines)
        self.fingerprint = files.digest(b"\n".join(self._lines))

    def read(self, start: int) -> Iterator[stream.Item]:
        """Items from a line on, counted without empty ones."""
        for place in range(start, len(self._lines)):
            name = f"line {place + 1}"
            try:
                fields, beside = _parse(self._lines[place])
                name = fields["image"]
                yield self._item(place + 1, fields["image"], beside)
            except (captions.BadRecord, image_decoding.BadPicture) as error:
                bad = captions.BadRecord(error.reason, str(error))
                yield stream.Item(place + 1, reject=bad.as_reject(name))

    def image_name(self, place: int) -> str:
        """The picture that a good line names."""
        return _parse(self._lines[place])[0]["image"]

    def _item(self, position: int, name: str, beside: captions.SidecarCaption) -> stream.Item:
        path = self._directory / name
        ending = path.suffix.removeprefix(".")
        picture = image_decoding.decode(read_file(path), ending, min_pixels=2)
        segments = (document_types.Text(beside.caption), document_types.Image(picture.pixels))
        found = document_types.Document(path.stem, segments, beside.url, beside.license)
        return stream.Item(position, found, notes=picture.notes)

    def __repr__(self) -> str:
        return f"FolderSource({str(self._directory)!r}, {self.size} lines)"


class FolderDocuments:
    """The good records of a folder, which can be read at any time; see `FolderSource`.

    Every picture is decoded once when the folder is opened, so that a record which is listed can be
    read.

    Attributes:
        rejects: (name, reason) of each bad record; the name is the picture's, or `line 3`.
    """

    def __init__(
        self, directory: epath.PathLike, on_progress: Callable[[int, int], None] | None = None
    ):
        """Reads the captions and checks every picture.

        Args:
            directory: the folder.
            on_progress: called with (lines checked, all lines).

        Raises:
            UserError: no folder, no captions.jsonl, or no good record in it.
        """
        self._source = FolderSource(directory)
        self._positions: list[int] = []
        self.rejects: list[tuple[str, str]] = []
        seen: set[str] = set()
        for item in self._source.read(0):
            if item.reject is not None:
                self.rejects.append((item.reject.name, item.reject.detail))
            elif item.document is not None and item.document.id in seen:
                name = self._source.image_name(item.position - 1)
                reason = f"has the id {item.document.id!r} of an earlier one."
                self.rejects.append((name, reason))
            elif item.document is not None:
                seen.add(item.document.id)
                self._positions.append(item.position - 1)
            if on_progress is not None:
                on_progress(item.position, self._source.size or 0)
        if not self._positions:
            name, reason = self.rejects[0] if self.rejects else (CAPTIONS, "is empty.")
            raise UserError(
                f"{directory} has no good record; of {len(self.rejects)} bad ones the first is "
                f"{name}, which {reason}"
            )

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, i: int) -> document_types.Document:
        """The i-th good record; its picture has its own size."""
        item = next(self._source.read(self._positions[i]))
        if item.document is None:
            raise UserError(f"Record {i} of {self._source} was changed: {item.reject}.")
        return item.document

    def __repr__(self) -> str:
        return f"FolderDocuments({self._source}, {len(self)} good)"


def _read_lines(directory: epath.Path) -> list[bytes]:
    if not directory.is_dir():
        raise UserError(f"{directory} is not a folder of pictures with a {CAPTIONS}.")
    try:
        data = (directory / CAPTIONS).read_bytes()
    except OSError:
        raise UserError(
            f'{directory / CAPTIONS} cannot be read; it holds {{"image", "caption"}} a line.'
        ) from None
    return [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]


def _parse(line: bytes) -> tuple[dict[str, Any], captions.SidecarCaption]:
    """A line's fields; errors lack the subject of their sentence."""
    fields = captions.parse_json(line)
    if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
        raise captions.BadRecord("not-json", 'is not {"image": "file.png", "caption": "..."}.')
    captions.check_path(fields["image"])
    return fields, captions.check(fields, fields["image"])
