"""Validates the untrusted fields of an image-caption record: caption, url, license and file name."""

import dataclasses
import json
import pathlib
from typing import Any

from rag_mm.core import caption_text
from rag_mm.core.errors import UserError
from rag_mm.memory.writing import stream

MAX_TEXT_BYTES = 1 << 20
REJECT_REASONS = {
    "not-utf8": "text or a name that is not UTF-8",
    "not-json": "a line or file that is not JSON of the expected form",
    "empty-caption": "no caption, or an empty one",
    "bad-field": "a url or license that is not text",
    "leads-outside": "an absolute path, one with `..`, or a link that leads outside of the folder",
    "too-long": f"a line or caption of more than {MAX_TEXT_BYTES:,} bytes",
}


class BadRecord(UserError):
    """A rejected record: `reason` is a reason code; the message may lack the subject of its sentence."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def as_reject(self, name: str) -> stream.Reject:
        """The error as a `Reject` of the record `name`."""
        return stream.Reject(name.encode("utf-8", "replace").decode(), self.reason, str(self))


@dataclasses.dataclass(frozen=True)
class SidecarCaption:
    """A caption with its provenance."""

    caption: str
    url: str | None = None
    license: str | None = None


def parse_json(data: bytes) -> Any:
    """Parses JSON from untrusted bytes.

    Raises:
        BadRecord: it is not UTF-8, not JSON, or longer than `MAX_TEXT_BYTES`.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise BadRecord(
            "too-long", f"has {len(data):,} bytes of text; at most {MAX_TEXT_BYTES:,} are read."
        )
    try:
        return json.loads(decode_text(data))
    except (ValueError, RecursionError) as error:
        raise BadRecord("not-json", f"is not JSON ({error}).") from None


def decode_text(data: bytes) -> str:
    """Decodes text from untrusted bytes, without a byte-order mark.

    Raises:
        BadRecord: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRecord("not-utf8", "is not UTF-8.") from None


def check(fields: dict[str, Any], name: str) -> SidecarCaption:
    """Validates `caption`, `url` and `license` of a record; the caption is cleaned by `caption_text.clean`.

    Args:
        fields: values of any type.
        name: the record's name, for messages.

    Raises:
        BadRecord: no caption, or a field that is not text.
    """
    caption = fields.get("caption")
    caption = caption_text.clean(caption) if isinstance(caption, str) else ""
    if not caption:
        raise BadRecord("empty-caption", f"gives {name} no caption.")
    if len(caption) > MAX_TEXT_BYTES:
        raise BadRecord("too-long", f"has {len(caption):,} characters; at most {MAX_TEXT_BYTES:,}.")
    check_encodable(caption)
    return SidecarCaption(caption, *check_provenance(fields, name))


def check_provenance(fields: dict[str, Any], name: str) -> tuple[str | None, str | None]:
    """The `url` and `license` of a record, which may lack them.

    Args:
        fields: values of any type.
        name: the record's name, for messages; checked, too.

    Raises:
        BadRecord: one is not text.
    """
    for key in ("url", "license"):
        if not isinstance(fields.get(key), str | None):
            raise BadRecord("bad-field", f"gives {name} a {key} that is not text.")
    url, license = fields.get("url"), fields.get("license")
    check_encodable(f"{url}{license}{name}")
    return url, license


def check_encodable(text: str) -> None:
    """Raises BadRecord if the text holds a lone surrogate, which cannot be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord("not-utf8", "holds a lone surrogate, which is not valid text.") from None


def check_path(name: str) -> pathlib.PurePosixPath:
    """Validates a relative path that must stay inside its folder.

    Raises:
        BadRecord: it leads outside the folder, or names no file.
    """
    path = pathlib.PurePosixPath(name)
    # Backslashes and drives lead outside only on Windows, but the folder may be copied there.
    is_outside = path.is_absolute() or pathlib.PureWindowsPath(name).drive
    if is_outside or ".." in name.replace("\\", "/").split("/") or "\0" in name:
        raise BadRecord("leads-outside", f"names {name!r}, which leads outside the folder.")
    if not path.stem:
        raise BadRecord("not-json", "names no file.")
    return path
