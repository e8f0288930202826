"""Documents from a folder of pictures and their captions, which a stranger may have made."""

import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from etils import epath

from rag_mm.core import document
from rag_mm.core.errors import UserError
from rag_mm.memory import images

CAPTIONS = "captions.jsonl"
_FORMATS = ("JPEG", "PNG", "WEBP")


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
        data = epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"Picture {path} cannot be read: {error.strerror or error}.") from error
    try:
        return _decode(data, is_whitened)
    except UserError as error:
        raise UserError(f"Picture {path} {error}") from None


def _decode(data: bytes, is_whitened: bool = True) -> np.ndarray:
    """`load_image` of a file's content; errors lack the subject of their sentence."""
    too_large = f"has more than {images.MAX_PIXELS:,} pixels; scale it down."
    try:
        with PIL.Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > images.MAX_PIXELS:
                raise UserError(too_large)
            image.load()
            return _to_rgb(PIL.ImageOps.exif_transpose(image), is_whitened)
    except UserError:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise UserError(too_large) from None
    except PIL.UnidentifiedImageError:
        raise UserError("is not a JPEG, PNG or WebP picture.") from None
    except Exception as error:  # Damaged bytes raise whatever the decoder stumbled over.
        raise UserError(f"is damaged ({error}).") from error


def _to_rgb(image: PIL.Image.Image, is_whitened: bool) -> np.ndarray:
    if image.mode.startswith("I"):  # 16 bits; Pillow would clip at 255 instead of scaling.
        gray = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if is_whitened and image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


class FolderDocuments:
    """The good records of a folder, each a caption and a picture, in the order of captions.jsonl.

    A line is `{"image": "file.png", "caption": "...", "url": "...", "license": "..."}`, the last
    two optional; the document's id is the picture's file name without its ending. Every picture is
    decoded once when the folder is opened, so that a record which is listed can be read.

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
        self._directory = epath.Path(directory)
        self._records: list[dict[str, Any]] = []
        self.rejects: list[tuple[str, str]] = []
        lines = _read_lines(self._directory)
        seen: set[str] = set()
        for number, line in enumerate(lines, start=1):
            name = f"line {number}"
            try:
                record = _parse(line)
                name = record["image"]
                self._check(record, seen)
                seen.add(record["id"])
                self._records.append(record)
            except UserError as error:
                self.rejects.append((name, str(error)))
            if on_progress is not None:
                on_progress(number, len(lines))
        if not self._records:
            name, reason = self.rejects[0] if self.rejects else (CAPTIONS, "is empty.")
            raise UserError(
                f"{directory} has no good record; of {len(self.rejects)} bad ones the first is "
                f"{name}, which {reason}"
            )

    def _check(self, record: dict[str, Any], seen: set[str]) -> None:
        if record["id"] in seen:
            raise UserError(f"has the id {record['id']!r} of an earlier one.")
        try:
            data = (self._directory / record["image"]).read_bytes()
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror or error}.") from error
        _decode(data)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> document.Document:
        """The i-th good record; its picture has its own size."""
        record = self._records[i]
        return document.Document(
            id=record["id"],
            segments=(
                document.Text(record["caption"]),
                document.Image(load_image(self._directory / record["image"])),
            ),
            url=record.get("url"),
            license=record.get("license"),
        )

    def __repr__(self) -> str:
        return f"FolderDocuments({str(self._directory)!r}, {len(self)} good)"


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


def _parse(line: bytes) -> dict[str, Any]:
    """A line's fields and its id; errors lack the subject of their sentence."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise UserError("is not UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON ({error}).") from None
    if not isinstance(record, dict) or not isinstance(record.get("image"), str):
        raise UserError('is not {"image": "file.png", "caption": "..."}.')
    path = pathlib.PurePosixPath(record["image"])
    # Backslashes and drives lead outside on Windows alone, but a folder may travel.
    outside = path.is_absolute() or pathlib.PureWindowsPath(record["image"]).drive
    if outside or ".." in record["image"].replace("\\", "/").split("/") or "\0" in path.name:
        raise UserError(f"names {record['image']!r}, which leads outside the folder.")
    if not path.stem:
        raise UserError("names no file.")
    caption = record.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise UserError(f"gives {record['image']} no caption.")
    try:
        "".join([caption, path.stem, str(record.get("url")), str(record.get("license"))]).encode()
    except UnicodeEncodeError:
        raise UserError("holds half of a surrogate pair, which is no text.") from None
    for key in ("url", "license"):
        if not isinstance(record.get(key), str | None):
            raise UserError(f"gives {record['image']} a {key} that is not text.")
    return {**record, "id": path.stem}
