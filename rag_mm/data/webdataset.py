"""Untrusted WebDataset tars: read sequentially, never extracted, every member checked."""

import dataclasses
import os
import pathlib
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO

from rag_mm.core import document_types, files
from rag_mm.core.errors import UserError
from rag_mm.data import captions, image_decoding
from rag_mm.memory.writing import stream

REJECT_REASONS = {
    "link": "a symbolic or hard link",
    "device": "a device or a pipe",
    "sparse-member": "a sparse file, which claims more bytes than it holds",
    "oversized-member": "an image or text file above the size limit",
    "duplicate-member": "two files of the same type with the same key",
    "no-picture": "a key without a JPEG, PNG or WebP image",
    "truncated-tar": "the file ends before its last member does",
    "damaged-tar": "an invalid header",
    "not-a-tar": "not a tar file, or a compressed one",
}
MAX_MEMBER_BYTES = 1 << 26
MAX_TEXT_BYTES = 1 << 20
_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "json")
_BITS = 40  # A position is the tar's number and, in its low bits, the number of items read from it.


@dataclasses.dataclass
class _Sample:
    """Consecutive members with the same key."""

    key: str
    data: dict[str, bytes] = dataclasses.field(default_factory=dict)
    bad: captions.BadRecord | None = None


class _Header(tarfile.TarInfo):
    """A header that records how the archive ended."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:  # tarfile treats some of these as the archive's end.
            tar.ending = type(error).__name__
            raise


class TarSource:
    """Samples of one or more tars: an image with its caption in `.txt` or `.json`, grouped by key.

    The key is a member's path up to the first dot of its name; it becomes the document's id. `.json` may
    hold `caption`, `url` and `license`; a caption in `.txt` takes precedence.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        """Opens no file yet.

        Raises:
            UserError: there are no paths, or one is not a file.
        """
        self._paths = sorted(pathlib.Path(path) for path in paths)
        if not self._paths:
            raise UserError("There are no tars to read.")
        for path in self._paths:
            if not path.is_file():
                raise UserError(f"{path} is not a tar file.")
        self.size: int | None = None
        described = [[path.name, path.stat().st_size] for path in self._paths]
        self.fingerprint = files.digest(files.canonical_json(described).encode())

    @property
    def starts(self) -> list[int]:
        """The position at which each tar begins, followed by the position after the last tar."""
        return [number << _BITS for number in range(len(self._paths) + 1)]

    def read(self, start: int) -> Iterator[stream.Item]:
        """Items from position `start` on; earlier tars are not opened."""
        first, skipped = start >> _BITS, start & ((1 << _BITS) - 1)
        for number in range(first, len(self._paths)):
            # Counted from 1, so that the end of a tar differs from the beginning of the next.
            for count, sample in enumerate(_samples(self._paths[number]), start=1):
                if count > skipped:
                    yield _item((number << _BITS) + count, sample)
            skipped = 0

    def __repr__(self) -> str:
        return f"TarSource({[str(path) for path in self._paths]})"


def _samples(path: pathlib.Path) -> Iterator[_Sample]:
    sample: _Sample | None = None
    with path.open("rb") as file:
        try:
            for key, ending, content in _members(file):
                if sample is None or sample.key != key:
                    if sample is not None:
                        yield sample
                    sample = _Sample(key)
                _put(sample, ending, content)
        except captions.BadRecord as error:
            # The sample before it may be incomplete, such as without its license, so it is dropped too.
            yield _Sample(path.name, bad=error)
            return
    if sample is not None:
        yield sample


def _members(file: IO[bytes]) -> Iterator[tuple[str, str, bytes | captions.BadRecord]]:
    """Key, ending, and content (or the problem) of each member that is not a folder.

    Raises:
        BadRecord: the archive is damaged and cannot be read further.
    """
    try:
        with tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as tar:
            for member in tar:
                # tarfile keeps a list of all members, which would grow without bound in a long tar.
                vars(tar)["members"] = []
                if not member.isdir():
                    yield _member(tar, member)
            ending = getattr(tar, "ending", "EOFHeaderError")
    except captions.BadRecord:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError, RecursionError) as error:
        raise _classify(file, error) from error
    if ending == "TruncatedHeaderError":
        raise captions.BadRecord("truncated-tar", "ends inside a header.")
    if ending not in ("EOFHeaderError", "EmptyHeaderError"):
        raise captions.BadRecord("damaged-tar", f"has an invalid header ({ending}).")


def _classify(file: IO[bytes], error: Exception) -> captions.BadRecord:
    """The rejection for a tar that could not be read to its end."""
    file.seek(0)
    head = file.read(512)
    if head[257:262] != b"ustar":
        return captions.BadRecord("not-a-tar", "is not a tar file, or compressed: decompress it.")
    if "unexpected end" in str(error):
        return captions.BadRecord("truncated-tar", f"ends too early ({error}).")
    return captions.BadRecord("damaged-tar", f"cannot be read further ({error}).")


def _member(
    tar: tarfile.TarFile, member: tarfile.TarInfo
) -> tuple[str, str, bytes | captions.BadRecord]:
    folder, slash, name = member.name.rpartition("/")
    stem, _, ending = name.partition(".")
    key, ending = f"{folder}{slash}{stem}", ending.lower()
    try:
        _check_member(member, ending)
        data = b""
        if ending in _IMAGES + _TEXTS:
            content = tar.extractfile(member)
            data = b"" if content is None else content.read()
        return key, ending, data
    except captions.BadRecord as error:
        return key, ending, error


def _check_member(member: tarfile.TarInfo, ending: str) -> None:
    captions.check_encodable(member.name)
    try:
        captions.check_path(member.name)
    except captions.BadRecord:
        raise captions.BadRecord(
            "leads-outside", f"has a member {member.name!r}, which leads outside."
        ) from None
    if member.issym() or member.islnk():
        raise captions.BadRecord(
            "link", f"is a link to {member.linkname!r}; links are not followed."
        )
    if member.issparse():
        raise captions.BadRecord(
            "sparse-member", "is a sparse file, which claims more bytes than it holds."
        )
    if not member.isreg():
        raise captions.BadRecord("device", "is neither a file nor a folder.")
    limit = MAX_TEXT_BYTES if ending in _TEXTS else MAX_MEMBER_BYTES
    if ending in _IMAGES + _TEXTS and member.size > limit:
        raise captions.BadRecord(
            "oversized-member",
            f"has {member.size:,} bytes in .{ending}; at most {limit:,} are read.",
        )


def _put(sample: _Sample, ending: str, content: bytes | captions.BadRecord) -> None:
    if isinstance(content, captions.BadRecord):
        sample.bad = sample.bad or content
    elif ending in _IMAGES + _TEXTS:
        kind = "image" if ending in _IMAGES else ending
        if any(kind == ("image" if e in _IMAGES else e) for e in sample.data):
            error = captions.BadRecord("duplicate-member", f"has two {kind} members.")
            sample.bad = sample.bad or error
        sample.data[ending] = content


def _item(position: int, sample: _Sample) -> stream.Item:
    try:
        if sample.bad is not None:
            raise sample.bad
        ending = next((e for e in _IMAGES if e in sample.data), None)
        if ending is None:
            raise captions.BadRecord("no-picture", "has no JPEG, PNG or WebP image.")
        fields = _fields(sample)
        sidecar = captions.check(fields, sample.key)
        image = image_decoding.decode(sample.data[ending], ending, min_pixels=2)
    except (captions.BadRecord, image_decoding.BadImage) as error:
        bad = captions.BadRecord(error.reason, str(error))
        return stream.Item(position, reject=bad.as_reject(sample.key))
    segments = (document_types.Text(sidecar.caption), document_types.Image(image.pixels))
    document = document_types.Document(sample.key, segments, sidecar.url, sidecar.license)
    return stream.Item(position, document, notes=image.notes)


def _fields(sample: _Sample) -> dict:
    fields = {}
    if "json" in sample.data:
        fields = captions.parse_json(sample.data["json"])
        if not isinstance(fields, dict):
            raise captions.BadRecord("not-json", "has a .json that is not an object.")
    if "txt" in sample.data:
        fields["caption"] = captions.decode_text(sample.data["txt"])
    return fields
