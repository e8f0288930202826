"""Samples of a WebDataset tar: which members make one document, and what its segments are."""

import dataclasses
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from rag_mm.core import document_types
from rag_mm.data import captions, document_json, file_names, image_decoding
from rag_mm.memory.writing import stream

REJECT_REASONS = {
    "duplicate-member": "two files of the same type with the same key",
    "no-picture": "a key without a JPEG, PNG or WebP image",
    "missing-member": "a picture that `segments` names and that is no member of the sample",
    "oversized-sample": "pictures named by `segments` above the limit of their bytes in all",
}
MAX_SAMPLE_BYTES = 1 << 28
IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "json")


@dataclasses.dataclass
class Sample:
    """Consecutive members with the same key.

    Attributes:
        key: the key; at last, the document's id.
        data: content of the image and the texts, by ending.
        bad: the problem of its first bad member.
        is_about: whether all members are files about the samples, unless there is an image.
        group: the key before it becomes the id, of a sample with segments.
        parts: content of the images with further dots in their names, by key and ending.
    """

    key: str
    data: dict[str, bytes] = dataclasses.field(default_factory=dict)
    bad: captions.BadRecord | None = None
    is_about: bool = True
    group: str = ""
    parts: dict[tuple[str, str], bytes] = dataclasses.field(default_factory=dict)

    @property
    def image(self) -> str | None:
        """The ending of its image, or None."""
        return next((ending for ending in IMAGES if ending in self.data), None)


@dataclasses.dataclass(frozen=True)
class Member:
    """One file of a tar.

    Attributes:
        group: its path up to the first dot of its name.
        key: its path up to the last dot if an image or a text follows, else `group`.
        ending: what follows the key's dot, in lower case.
        content: its bytes, empty if it is neither image nor text; or its problem.
    """

    group: str
    key: str
    ending: str
    content: bytes | captions.BadRecord


def parse_name(path: str) -> tuple[str, str, str]:
    """Group, key and ending of a member; names in either Unicode form are one."""
    path = unicodedata.normalize("NFC", path)
    folder, slash, name = path.rpartition("/")
    first, _, ending = name.partition(".")
    last, _, last_ending = name.rpartition(".")
    group, key = f"{folder}{slash}{first}", f"{folder}{slash}{last}"
    if last and last_ending.lower() in IMAGES + TEXTS:
        return group, key, last_ending.lower()
    return group, group, ending.lower()


def split(members: Iterable[Member]) -> Iterator[Sample]:
    """The samples among the members of one group, those with further dots in their keys first."""
    main, part = None, None
    lacking: list[Sample] = []
    parts = _Parts()
    for member in members:
        if member.key == member.group:
            main = main or Sample(member.key)
            _put(main, member)
            continue
        if part is None or part.key != member.key:
            if part is not None:
                yield from _own(part, lacking, parts)
            part = Sample(member.key)
        _put(part, member)
    if part is not None:
        yield from _own(part, lacking, parts)
    has_segments = main is not None and _has_segments(main)
    if main is not None and has_segments:
        parts.give(main)
    if (
        main is not None
        and (main.data or main.bad or part is None)
        and (main.image is not None or has_segments or not main.is_about)
    ):
        yield main
    if main is None or (main.image is None and not has_segments):
        yield from lacking


class _Parts:
    """The images of one group that have no caption of their own, while they are few."""

    def __init__(self):
        self._data: dict[tuple[str, str], bytes] = {}
        self._size = 0

    def add(self, part: Sample) -> None:
        for ending in IMAGES:
            if ending in part.data and self._size <= MAX_SAMPLE_BYTES:
                self._data[part.key, ending] = part.data[ending]
                self._size += len(part.data[ending])
        if self._size > MAX_SAMPLE_BYTES:
            self._data.clear()

    def give(self, main: Sample) -> None:
        """Hands the images over to the sample whose `.json` has segments."""
        main.group, main.parts = main.key, self._data
        if self._size > MAX_SAMPLE_BYTES:
            error = captions.BadRecord(
                "oversized-sample",
                f"has images of more than {MAX_SAMPLE_BYTES:,} bytes in all; scale them down.",
            )
            main.bad = main.bad or error


def _own(part: Sample, lacking: list[Sample], parts: _Parts) -> Iterator[Sample]:
    """A part, unless it lacks an image or a caption: then it is listed in `lacking`, its image in `parts`."""
    try:
        if part.bad is None:
            _read_caption(part)
    except captions.BadRecord as error:
        if error.reason in ("no-picture", "empty-caption"):
            lacking.append(Sample(part.key, bad=error))
            parts.add(part)
            return
    yield part


def _put(sample: Sample, member: Member) -> None:
    ending, content = member.ending, member.content
    is_about = file_names.is_about_samples(f"{member.key}.{ending}")
    sample.is_about = sample.is_about and is_about
    if isinstance(content, captions.BadRecord):
        sample.bad = sample.bad or content
    elif ending in IMAGES + TEXTS:
        kind = "image" if ending in IMAGES else ending
        if any(kind == ("image" if e in IMAGES else e) for e in sample.data):
            error = captions.BadRecord("duplicate-member", f"has two {kind} members.")
            sample.bad = sample.bad or error
        sample.data[ending] = content


def make_item(position: int, sample: Sample) -> stream.Item:
    """The document of a sample, its pictures decoded, or the reason why it is rejected."""
    try:
        if sample.bad is not None:
            raise sample.bad
        if _has_segments(sample):
            return _segments_item(position, sample)
        ending, sidecar = _read_caption(sample)
        image = image_decoding.decode(sample.data[ending], ending, min_pixels=2)
    except (captions.BadRecord, image_decoding.BadImage) as error:
        bad = captions.BadRecord(error.reason, str(error))
        return stream.Item(position, reject=bad.as_reject(sample.key))
    segments = (document_types.Text(sidecar.caption), document_types.Image(image.pixels))
    document = document_types.Document(sample.key, segments, sidecar.url, sidecar.license)
    return stream.Item(position, document, notes=image.notes)


def _segments_item(position: int, sample: Sample) -> stream.Item:
    """The document of a sample whose `.json` has segments; raises BadRecord and BadImage."""

    def read(name: str) -> tuple[bytes, str]:
        _, key, ending = parse_name(f"{sample.group}.{name}")
        data = sample.data.get(ending) if key == sample.group else sample.parts.get((key, ending))
        if data is None or ending not in IMAGES:
            raise captions.BadRecord(
                "missing-member",
                f"is no image {key}.{ending} of the sample, or one with a caption of its own.",
            )
        return data, ending

    document, notes = document_json.parse(_read_json(sample), read, sample.key)
    return stream.Item(position, document, notes=notes)


def _has_segments(sample: Sample) -> bool:
    try:
        return document_json.has_segments(_read_json(sample))
    except captions.BadRecord:
        return False


def _read_caption(sample: Sample) -> tuple[str, captions.SidecarCaption]:
    """The ending of the image, and the caption.

    Raises:
        BadRecord: either is missing or bad.
    """
    if sample.image is None:
        raise captions.BadRecord("no-picture", "has no JPEG, PNG or WebP image.")
    return sample.image, captions.check(_fields(sample), sample.key)


def _read_json(sample: Sample) -> dict[str, Any]:
    """The object in `.json`, {} without one; raises BadRecord if it is no object."""
    if "json" not in sample.data:
        return {}
    fields = captions.parse_json(sample.data["json"])
    if not isinstance(fields, dict):
        raise captions.BadRecord("not-json", "has a .json that is not an object.")
    return fields


def _fields(sample: Sample) -> dict[str, Any]:
    fields = _read_json(sample)
    if "txt" in sample.data:
        fields["caption"] = captions.decode_text(sample.data["txt"])
    return fields
