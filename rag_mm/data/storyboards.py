"""Storyboards: thumbnails of a video at equal distances and its subtitles, as one document of Emu.

    {"id": "v1", "storyboard": {"frames": ["0.jpg", "1.jpg"], "seconds": 93.5,
                                "subtitles": [[0.4, "first we cut"], [3.1, "the apple"]]}}

Storyboards are far smaller than videos, and nothing has to be decoded.
"""

import math
from collections.abc import Sequence
from typing import Any

from rag_mm.core import caption_text
from rag_mm.data import captions

KEY = "storyboard"


def merge(
    frames: Sequence[str], seconds: float, subtitles: Sequence[tuple[float, str]]
) -> list[dict[str, str]]:
    """Frames and subtitles in order of time, as segments of `document_json`.

    Frame k is at k times the interval, the duration over the number of frames, rounded to whole seconds but
    at least one. What is said before a frame is one text before it, what is said after the last frame the
    last text; words that begin as a frame does come after it.

    Args:
        frames: file names in order of time.
        seconds: duration of the video.
        subtitles: start in seconds and text of each, in any order.
    """
    interval = max(1, round(seconds / max(len(frames), 1)))
    spoken = sorted(subtitles, key=lambda each: each[0])
    segments: list[dict[str, str]] = []
    number = 0
    for k, name in enumerate([*frames, None]):
        end = k * interval if name is not None else math.inf
        words = []
        while number < len(spoken) and spoken[number][0] < end:
            words.append(caption_text.clean(spoken[number][1]))
            number += 1
        if text := " ".join(filter(None, words)):
            segments.append({"text": text})
        if name is not None:
            segments.append({"image": name})
    return segments


def to_segments(fields: dict[str, Any]) -> list[dict[str, str]]:
    """The segments of a document with a storyboard, from an untrusted file.

    Raises:
        BadRecord: a field is missing or of another type; the message lacks the subject of its sentence.
    """
    board = fields[KEY] if isinstance(fields[KEY], dict) else {}
    frames, seconds, spoken = (board.get(name) for name in ("frames", "seconds", "subtitles"))
    if (
        not isinstance(frames, list)
        or not frames
        or not all(isinstance(name, str) for name in frames)
        or not _is_time(seconds)
        or not isinstance(spoken, list)
        or not all(map(_is_subtitle, spoken))
    ):
        raise captions.BadRecord(
            "bad-segment",
            'has a storyboard that is not {"frames": ["FILE", ..], "seconds": 93.5, '
            '"subtitles": [[0.4, "words"], ..]}.',
        )
    return merge(frames, float(board["seconds"]), [(float(at), text) for at, text in spoken])


def _is_time(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value < math.inf


def _is_subtitle(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and _is_time(value[0]) and isinstance(value[1], str)
