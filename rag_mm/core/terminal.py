"""Text that strangers wrote, such as captions, urls and file names, as it may be printed on a terminal."""

import re
import typing
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
# Control characters, which move the cursor, set the title or fill the clipboard, and those that reverse the
# order of what follows; line ends and tabs are layout.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(value: T) -> T:
    """The value with control characters escaped, as `\\x1b`, in all texts inside dicts, lists and tuples."""
    escaped: object = value
    if isinstance(value, str):
        escaped = _CONTROL.sub(_escape, value)
    elif isinstance(value, Mapping):
        escaped = {printable(key): printable(inner) for key, inner in value.items()}
    elif type(value) in (list, tuple):
        items = map(printable, typing.cast(typing.Iterable, value))
        escaped = list(items) if isinstance(value, list) else tuple(items)
    return typing.cast(T, escaped)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
