"""Records: a document with its embeddings and codes, serialized and validated on reading.

The bytes are msgpack, never pickle: reading an untrusted record can fail but cannot execute code.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from rag_mm.core import document_types, image_files
from rag_mm.core.errors import UserError

Codes = Mapping[int, np.ndarray]
"""One tokenizer's codes by segment: int32 [N] of an image, [F, N] of a video; texts have none."""

_FORMAT = 2
_KEYS = {"format", "id", "url", "license", "segments", "embeddings", "codes"}
_KEYS_OF_1 = _KEYS | {"tokenizer"}  # Format 1: one tokenizer's codes of the first image; no videos.
_VIEW = re.compile(r"[a-z]+")


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """The stored form of one memory row.

    Attributes:
        document: the document.
        embeddings: float32 [D] by view, all of the same width.
        codes: by the image tokenizer's fingerprint, then by the segment's index in the document: int32 [N]
            of an image, [F, N] of a video of F frames.
    """

    document: document_types.Document
    embeddings: Mapping[str, np.ndarray]
    codes: Mapping[str, Codes] = dataclasses.field(default_factory=dict)

    def first_codes(self, tokenizer: str | None) -> np.ndarray | None:
        """A tokenizer's codes of the first picture, int32 [N]: an image, or the first frame of a video.

        None if there is no picture, or it has no codes of this tokenizer.
        """
        codes = {} if tokenizer is None else self.codes.get(tokenizer, {})
        first = next(iter(picture_segments(self.document)), None)
        if first is None or first not in codes:
            return None
        return codes[first] if codes[first].ndim == 1 else codes[first][0]

    def picture_codes(self, tokenizer: str) -> list[np.ndarray]:
        """A tokenizer's codes of every picture, int32 [N] each, in the order of `Document.pictures`.

        Raises:
            UserError: a picture has no codes of this tokenizer.
        """
        codes = self.codes.get(tokenizer, {})
        found: list[np.ndarray] = []
        for i in picture_segments(self.document):
            if i not in codes:
                raise UserError(
                    f"Segment {i} of document {self.document.id!r} has no codes of the image tokenizer "
                    f"{tokenizer[:12]}; add them with `rag-mm memory add-codes`."
                )
            found += [codes[i]] if codes[i].ndim == 1 else list(codes[i])
        return found


def picture_segments(document: document_types.Document) -> list[int]:
    """Indices of a document's images and videos."""
    return [i for i, s in enumerate(document.segments) if not isinstance(s, document_types.Text)]


def to_bytes(record: Record) -> bytes:
    """Serializes a record with msgpack; equal records give equal bytes.

    Raises:
        ValueError: codes are of a text segment or of another number of frames than the video has.
    """
    segments = record.document.segments
    views = sorted(record.embeddings)
    codes = {}
    for tokenizer in sorted(record.codes):
        by_segment = sorted(record.codes[tokenizer].items())
        for i, values in by_segment:
            if not 0 <= i < len(segments) or not _fits(segments[i], values.shape):
                raise ValueError(f"codes {values.shape} do not fit segment {i} of {len(segments)}")
        codes[tokenizer] = [
            [i, list(values.shape), values.astype("<i4").tobytes()] for i, values in by_segment
        ]
    return msgpack.packb(
        {
            "format": _FORMAT,
            "id": record.document.id,
            "url": record.document.url,
            "license": record.document.license,
            "segments": [_segment_fields(segment) for segment in segments],
            "embeddings": {v: record.embeddings[v].astype("<f4").tobytes() for v in views},
            "codes": codes,
        }
    )


def from_bytes(data: bytes) -> Record:
    """Parses the bytes of `to_bytes`, also those of format 1, and checks every field.

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
    _require(isinstance(fields, dict) and "format" in fields, "its fields are not a record's")
    version = fields["format"]
    _require(version in (1, _FORMAT), f"its format is {version!r}, not 1 or {_FORMAT}")
    keys = _KEYS_OF_1 if version == 1 else _KEYS
    _require(set(fields) == keys, "its fields are not a record's")
    _require(isinstance(fields["id"], str) and fields["id"] != "", "it has no id")
    for name in ("url", "license"):
        _require(isinstance(fields[name], str | None), f"its {name} is not text")
    _require(isinstance(fields["segments"], list), "its segments are not a list")
    _require(isinstance(fields["embeddings"], dict), "its embeddings are not by view")
    embeddings = {}
    for view, values in fields["embeddings"].items():
        _require(_VIEW.fullmatch(view) is not None, f"it has a view {view!r}")
        embeddings[view] = np.frombuffer(values, "<f4").astype(np.float32)
        _require(bool(np.isfinite(embeddings[view]).all()), f"its embedding {view} is not finite")
    document = document_types.Document(
        id=fields["id"],
        segments=_segments(fields["segments"]),
        url=fields["url"],
        license=fields["license"],
    )
    codes = _codes_of_format_1(fields, document) if version == 1 else fields["codes"]
    return Record(document, embeddings, _codes(codes, document.segments))


def _codes_of_format_1(fields: Any, document: document_types.Document) -> Any:
    """The codes of the first image, as format 2 stores them."""
    values, tokenizer = fields["codes"], fields["tokenizer"]
    _require(isinstance(tokenizer, str | None), "its tokenizer is not text")
    _require((values is None) == (tokenizer is None), "codes need a tokenizer")
    if values is None:
        return {}
    _require(bool(picture_segments(document)), "codes need an image")
    return {tokenizer: [[picture_segments(document)[0], [len(values) // 4], values]]}


def _codes(fields: Any, segments: Sequence[document_types.Segment]) -> dict[str, dict]:
    _require(isinstance(fields, dict), "its codes are not by tokenizer")
    codes: dict[str, dict[int, np.ndarray]] = {}
    for tokenizer, entries in fields.items():
        _require(isinstance(tokenizer, str), "its codes are not by tokenizer")
        codes[tokenizer] = {}
        for i, shape, values in entries:
            _require(
                type(i) is int and 0 <= i < len(segments) and i not in codes[tokenizer],
                "its codes are of no segment",
            )
            _require(
                _fits(segments[i], shape) and len(values) == 4 * math.prod(shape),
                f"its codes do not fit segment {i}",
            )
            codes[tokenizer][i] = np.frombuffer(values, "<i4").astype(np.int32).reshape(shape)
    return codes


def _fits(segment: document_types.Segment, shape: Sequence[int]) -> bool:
    """Whether codes of a segment can have this shape."""
    if isinstance(segment, document_types.Text) or min(shape, default=0) < 1:
        return False
    if isinstance(segment, document_types.Image):
        return len(shape) == 1
    return len(shape) == 2 and shape[0] == len(segment.frames)


def _segment_fields(segment: document_types.Segment) -> dict[str, Any]:
    if isinstance(segment, document_types.Text):
        return {"text": segment.text}
    if isinstance(segment, document_types.Image):
        return {"png": image_files.encode_png(segment.pixels)}
    frames = [image_files.encode_png(frame) for frame in segment.frames]
    return {"video": frames, "fps": float(segment.fps)}


def _segments(fields: list[Any]) -> tuple[document_types.Segment, ...]:
    """The segments; pictures are decoded only while the document stays within its limit of pixels."""
    segments: list[document_types.Segment] = []
    left = image_files.MAX_DOCUMENT_PIXELS
    for each in fields:
        segments.append(_segment(each, left))
        if not isinstance(segments[-1], document_types.Text):
            left -= sum(picture[..., 0].size for picture in segments[-1].pictures)
    return tuple(segments)


def _segment(fields: Any, max_pixels: int) -> document_types.Segment:
    kind = "a segment is neither text, png nor video"
    _require(isinstance(fields, dict), kind)
    if set(fields) == {"text"}:
        _require(isinstance(fields["text"], str), kind)
        return document_types.Text(fields["text"])
    is_video = set(fields) == {"video", "fps"}
    pictures = fields["video"] if is_video else [fields.get("png")]
    _require(is_video or set(fields) == {"png"}, kind)
    _require(isinstance(pictures, list) and all(isinstance(p, bytes) for p in pictures), kind)
    frames = []
    for data in pictures:
        limit = min(max_pixels, image_files.MAX_PIXELS)
        frames.append(image_files.decode_png(data, limit))
        max_pixels -= frames[-1][..., 0].size
    if not is_video:
        return document_types.Image(frames[0])
    _require(isinstance(fields["fps"], float), "a video's fps is no number")
    return document_types.Video(np.stack(frames), fields["fps"])


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise UserError(f"A record is damaged: {problem}.")
