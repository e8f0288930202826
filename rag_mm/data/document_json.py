"""The JSON form of a document: its segments in any order, pictures named as files.

    {"id": "a", "segments": [{"text": "before"}, {"image": "a.png"}, {"text": "after"},
                             {"video": ["1.png", "2.png"], "fps": 8}], "url": "..", "license": ".."}

`url` and `license` are optional. Texts are cleaned by `caption_text.clean`, and must not be empty. Further
keys of the object are ignored; further keys of a segment are errors. Instead of segments, a document may have
the `storyboard` of a video (`storyboards`), or be a web page as in MMC4 (`web_pages`).
"""

import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np

from rag_mm.core import caption_text, image_files
from rag_mm.core.document_types import Document, Image, Segment, Text, Video
from rag_mm.data import captions, image_decoding, storyboards, web_pages

SEGMENTS = "segments"
MAX_PICTURES = 4096
MAX_SEGMENTS = 4096
MAX_FPS = 1_000_000
REJECT_REASONS = {
    "bad-segment": "no segments, or one that is neither a text, an image nor a video of frames",
    "too-many-segments": f"more than {MAX_SEGMENTS:,} segments, or {MAX_PICTURES:,} pictures",
    "uneven-frames": "frames of one video that differ in size",
}

# What a document has instead of segments, and what makes segments of it.
_OTHER_FORMS: dict[str, Callable[[dict[str, Any]], list[dict[str, str]]]] = {
    storyboards.KEY: storyboards.to_segments,
    web_pages.KEY: web_pages.to_segments,
}

ReadFile = Callable[[str], tuple[bytes, str]]
"""Maps a file's name in the JSON to its bytes and its ending; raises BadRecord."""


def has_segments(fields: Any) -> bool:
    """Whether parsed JSON is a document in this form, or in one that segments are made of."""
    return isinstance(fields, dict) and bool({SEGMENTS, *_OTHER_FORMS} & fields.keys())


def name_of(fields: dict[str, Any]) -> str | None:
    """The `id` of parsed JSON in this form; None without one, or if it is not text."""
    name = fields.get("id") if has_segments(fields) else None
    return name if isinstance(name, str) else None


def parse(
    fields: dict[str, Any], read_file: ReadFile, default_id: str | None = None
) -> tuple[Document, tuple[str, ...]]:
    """The document, and the codes of the conversions applied to its pictures (`image_decoding.NOTES`).

    Args:
        fields: parsed JSON from an untrusted file, for which `has_segments` holds.
        read_file: reads a picture.
        default_id: the id of a document whose JSON has none.

    Raises:
        BadRecord: a field is bad; the message lacks the subject of its sentence.
        BadImage: a picture is bad, likewise.
    """
    name = fields.get("id", default_id)
    if not isinstance(name, str) or not name.strip():
        raise captions.BadRecord("bad-field", "has no id, or one that is not text.")
    url, license = captions.check_provenance(fields, name)
    form = next((key for key in _OTHER_FORMS if key in fields and SEGMENTS not in fields), None)
    segments = fields[SEGMENTS] if form is None else _OTHER_FORMS[form](fields)
    if not isinstance(segments, list) or not segments:
        raise captions.BadRecord("bad-segment", "has segments that are no list, or an empty one.")
    _check_counts(segments)
    reader = _Reader(read_file)
    parsed = tuple(reader.segment(i, each) for i, each in enumerate(segments))
    document = Document(unicodedata.normalize("NFC", name), parsed, url, license)
    return document, tuple(sorted(reader.notes))


def _check_counts(segments: list[Any]) -> None:
    """Raises BadRecord if there are too many segments or pictures, before any is read."""
    videos = [s["video"] for s in segments if isinstance(s, dict) and "video" in s]
    num_frames = sum(len(frames) for frames in videos if isinstance(frames, list))
    if len(segments) > MAX_SEGMENTS or len(segments) + num_frames > MAX_SEGMENTS + MAX_PICTURES:
        raise captions.BadRecord(
            "too-many-segments",
            f"has {len(segments):,} segments with {num_frames:,} frames; at most {MAX_SEGMENTS:,} segments "
            f"and {MAX_PICTURES:,} pictures are read.",
        )


class _Reader:
    """Reads the segments of one document, of all of whose pictures the pixels are counted."""

    def __init__(self, read_file: ReadFile):
        self._read_file = read_file
        self._pixels_left = image_files.MAX_DOCUMENT_PIXELS
        self.notes: set[str] = set()

    def segment(self, i: int, fields: Any) -> Segment:
        kinds = set(fields) if isinstance(fields, dict) else set()
        if kinds == {"text"} and isinstance(fields["text"], str):
            text = caption_text.clean(fields["text"])
            if not text:
                raise captions.BadRecord("bad-segment", f"has an empty text as segment {i}.")
            captions.check_encodable(text)
            return Text(text)
        if kinds == {"image"} and isinstance(fields["image"], str):
            return Image(self._picture(fields["image"]))
        if kinds == {"video", "fps"} and _is_video(fields["video"], fields["fps"]):
            return self._video(i, fields["video"], float(fields["fps"]))
        raise captions.BadRecord(
            "bad-segment",
            f'has a segment {i} that is not {{"text": ".."}}, {{"image": "FILE"}} or '
            '{"video": ["FILE", ..], "fps": 8}.',
        )

    def _video(self, i: int, names: list[str], fps: float) -> Video:
        frames = []
        for name in names:
            frames.append(self._picture(name))
            if frames[-1].shape != frames[0].shape:
                raise captions.BadRecord(
                    "uneven-frames",
                    f"has frames of {frames[0].shape[:2]} and {frames[-1].shape[:2]} pixels in segment {i}; "
                    "scale them to one size.",
                )
        return Video(np.stack(frames), fps)

    def _picture(self, name: str) -> np.ndarray:
        try:
            captions.check_encodable(name)
            data, ending = self._read_file(name)
            limit = min(image_files.MAX_PIXELS, self._pixels_left)
            image = image_decoding.decode(data, ending, min_pixels=2, max_pixels=limit)
        except (captions.BadRecord, image_decoding.BadImage) as error:
            raise captions.BadRecord(error.reason, f"names {name!a}, which {error}") from error
        self.notes.update(image.notes)
        self._pixels_left -= image.pixels[..., 0].size
        return image.pixels


def _is_video(names: Any, fps: Any) -> bool:
    """Whether these are file names and a positive number that is no nonsense."""
    is_number = isinstance(fps, int | float) and not isinstance(fps, bool)
    are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return are_names and bool(names) and is_number and 0 < fps <= MAX_FPS
