"""What stands beside a picture: its caption, where it comes from, and its name, all checked."""

import dataclasses
import json
import pathlib
from typing import Any

from rag_mm.core.errors import UserError
from rag_mm.memory.writing import stream

REFUSALS = {
    "not-utf8": "text or a name that is not UTF-8",
    "not-json": "a line or a file that is not the JSON it should be",
    "empty-caption": "no caption, or an empty one",
    "bad-field": "a url or license that is not text",
    "leads-outside": "an absolute path, or one with `..`",
}


class BadRecord(UserError):
    """A record that is refused: `reason` is a code; the message may lack its sentence's subject."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def as_reject(self, name: str) -> stream.Reject:
        """The same, for a list."""
        return stream.Reject(name.encode("utf-8", "replace").decode(), self.reason, str(self))


@dataclasses.dataclass(frozen=True)
class SidecarCaption:
    """A caption with its provenance."""

    caption: str
    url: str | None = None
    license: str | None = None


def parse_json(data: bytes) -> Any:
    """JSON of a stranger's bytes.

    Raises:
        BadRecord: it is not UTF-8 or not JSON.
    """
    try:
        return json.loads(decode_text(data))
    except (ValueError, RecursionError) as error:
        raise BadRecord("not-json", f"is not JSON ({error}).") from None


def decode_text(data: bytes) -> str:
    """Text of a stranger's bytes.

    Raises:
        BadRecord: it is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRecord("not-utf8", "is not UTF-8.") from None


def check(fields: dict[str, Any], name: str) -> SidecarCaption:
    """`caption`, `url` and `license` of a record.

    Args:
        fields: of any type.
        name: what they describe, for the message.

    Raises:
        BadRecord: no caption, or a field that is not text.
    """
    caption = fields.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise BadRecord("empty-caption", f"gives {name} no caption.")
    for key in ("url", "license"):
        if not isinstance(fields.get(key), str | None):
            raise BadRecord("bad-field", f"gives {name} a {key} that is not text.")
    beside = SidecarCaption(caption, fields.get("url"), fields.get("license"))
    check_encodable(f"{caption}{beside.url}{beside.license}{name}")
    return beside


def check_encodable(text: str) -> None:
    """Raises BadRecord for half of a surrogate pair, which no file could hold as text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord("not-utf8", "holds half of a surrogate pair, which is no text.") from None


def check_path(name: str) -> pathlib.PurePosixPath:
    """A relative path that stays below where it starts.

    Raises:
        BadRecord: it does not, or names no file.
    """
    path = pathlib.PurePosixPath(name)
    # Backslashes and drives lead outside on Windows alone, but a folder may travel.
    outside = path.is_absolute() or pathlib.PureWindowsPath(name).drive
    if outside or ".." in name.replace("\\", "/").split("/") or "\0" in path.name:
        raise BadRecord("leads-outside", f"names {name!r}, which leads outside the folder.")
    if not path.stem:
        raise BadRecord("not-json", "names no file.")
    return path
