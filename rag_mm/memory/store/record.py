"""Records: a document with its embeddings and codes, serialized and validated on reading.

The bytes are msgpack, never pickle: reading an untrusted record can fail but cannot execute code.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from rag_mm.core import document_types, image_files
from rag_mm.core.errors import UserError

_FORMAT = 1
_KEYS = {"format", "id", "url", "license", "segments", "embeddings", "codes", "tokenizer"}
_VIEW = re.compile(r"[a-z]+")


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """The stored form of one memory row.

    Attributes:
        document: the document.
        embeddings: float32 [D] by view, all of the same width.
        codes: int32 [N] of the document's first image, or None.
        tokenizer: fingerprint of the image tokenizer that computed the codes, or None without codes.
    """

    document: document_types.Document
    embeddings: Mapping[str, np.ndarray]
    codes: np.ndarray | None = None
    tokenizer: str | None = None


def to_bytes(record: Record) -> bytes:
    """Serializes a record with msgpack; equal records give equal bytes."""
    segments = [
        {"text": segment.text}
        if isinstance(segment, document_types.Text)
        else {"png": image_files.encode_png(segment.pixels)}
        for segment in record.document.segments
    ]
    views = sorted(record.embeddings)
    return msgpack.packb(
        {
            "format": _FORMAT,
            "id": record.document.id,
            "url": record.document.url,
            "license": record.document.license,
            "segments": segments,
            "embeddings": {v: record.embeddings[v].astype("<f4").tobytes() for v in views},
            "codes": None if record.codes is None else record.codes.astype("<i4").tobytes(),
            "tokenizer": record.tokenizer,
        }
    )


def from_bytes(data: bytes) -> Record:
    """Parses the bytes of `to_bytes` and checks every field.

    Raises:
        UserError: the bytes are not a valid record.
    """
    try:
        # msgpack's size limits follow from the length of the data, so no larger object can be claimed.
        fields = msgpack.unpackb(data, raw=False, strict_map_key=True)
        return _from_fields(fields)
    except UserError:
        raise
    except Exception as error:  # msgpack raises many types on damaged bytes.
        raise UserError(f"A record is damaged ({error}).") from error


def _from_fields(fields: Any) -> Record:
    _require(isinstance(fields, dict) and set(fields) == _KEYS, "its fields are not a record's")
    _require(fields["format"] == _FORMAT, f"its format is {fields['format']!r}, not {_FORMAT}")
    _require(isinstance(fields["id"], str) and fields["id"] != "", "it has no id")
    for name in ("url", "license", "tokenizer"):
        _require(isinstance(fields[name], str | None), f"its {name} is not text")
    _require(isinstance(fields["segments"], list), "its segments are not a list")
    _require(isinstance(fields["embeddings"], dict), "its embeddings are not by view")
    _require((fields["codes"] is None) == (fields["tokenizer"] is None), "codes need a tokenizer")
    embeddings = {}
    for view, values in fields["embeddings"].items():
        _require(_VIEW.fullmatch(view) is not None, f"it has a view {view!r}")
        embeddings[view] = np.frombuffer(values, "<f4").astype(np.float32)
        _require(bool(np.isfinite(embeddings[view]).all()), f"its embedding {view} is not finite")
    codes = fields["codes"]
    return Record(
        document=document_types.Document(
            id=fields["id"],
            segments=tuple(_segment(segment) for segment in fields["segments"]),
            url=fields["url"],
            license=fields["license"],
        ),
        embeddings=embeddings,
        codes=None if codes is None else np.frombuffer(codes, "<i4").astype(np.int32),
        tokenizer=fields["tokenizer"],
    )


def _segment(fields: Any) -> document_types.Segment:
    _require(isinstance(fields, dict) and len(fields) == 1, "a segment is neither text nor png")
    if isinstance(fields.get("text"), str):
        return document_types.Text(fields["text"])
    _require(isinstance(fields.get("png"), bytes), "a segment is neither text nor png")
    return document_types.Image(image_files.decode_png(fields["png"]))


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise UserError(f"A record is damaged: {problem}.")
