"""Untrusted WebDataset tars: read sequentially, never extracted, every member checked."""

import dataclasses
import itertools
import os
import pathlib
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
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
# Part of the fingerprint: a build begun under other rules counts other samples, so it cannot be resumed.
_RULES = "dots in names, joined archives"
_CHUNK = 1 << 20
_BITS = 40  # A position is the tar's number and, in its low bits, the number of items read from it.


@dataclasses.dataclass
class _Sample:
    """Consecutive members with the same key."""

    key: str
    data: dict[str, bytes] = dataclasses.field(default_factory=dict)
    bad: captions.BadRecord | None = None

    @property
    def image(self) -> str | None:
        """The ending of its image, or None."""
        return next((ending for ending in _IMAGES if ending in self.data), None)


@dataclasses.dataclass(frozen=True)
class _Member:
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

    The key is a member's path up to the first dot of its name; it becomes the document's id. Where an image
    and its caption share further dots (`view 1.4.jpg`, `view 1.4.txt`), they are a sample of their own; other
    members with further dots (`000.mask.png` beside `000.jpg`) are not read. `.json` may hold `caption`,
    `url` and `license`; a caption in `.txt` takes precedence. Archives joined into one file are all read.
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
        described = [_RULES, *([path.name, path.stat().st_size] for path in self._paths)]
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
    with path.open("rb") as file:
        has_more = True
        try:
            while has_more:
                for _, members in itertools.groupby(_members(file), lambda member: member.group):
                    yield from _split(members)
                has_more = _find_next(file)
        except captions.BadRecord as error:
            # The sample before it may be incomplete, such as without its license, so it is dropped too.
            yield _Sample(path.name, bad=error)


def _split(members: Iterable[_Member]) -> Iterator[_Sample]:
    """The samples among the members of one group, those with further dots in their keys first."""
    main, part = None, None
    lacking: list[_Sample] = []
    for member in members:
        if member.key == member.group:
            main = main or _Sample(member.key)
            _put(main, member)
            continue
        if part is None or part.key != member.key:
            if part is not None:
                yield from _own(part, lacking)
            part = _Sample(member.key)
        _put(part, member)
    if part is not None:
        yield from _own(part, lacking)
    if main is not None and (main.data or main.bad or part is None):
        yield main
    if main is None or main.image is None:
        yield from lacking


def _own(part: _Sample, lacking: list[_Sample]) -> Iterator[_Sample]:
    """A part, unless it lacks an image or a caption: then it is listed, without its data, in `lacking`."""
    try:
        if part.bad is None:
            _read_caption(part)
    except captions.BadRecord as error:
        if error.reason in ("no-picture", "empty-caption"):
            lacking.append(_Sample(part.key, bad=error))
            return
    yield part


def _find_next(file: IO[bytes]) -> bool:
    """Moves on to the first block that is not zero, which begins a joined archive; whether there is one."""
    position = file.tell()
    while True:
        try:
            # A sparse file of a few kB may have terabytes of zeros.
            data = os.lseek(file.fileno(), position, os.SEEK_DATA)
        except OSError:
            return False
        position += (data - position) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        file.seek(position)
        chunk = file.read(_CHUNK)
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if zeros < len(chunk):
            file.seek(position + zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE)
            return True
        position += len(chunk)


def _members(file: IO[bytes]) -> Iterator[_Member]:
    """The files of the archive that begins here; leaves `file` at the archive's end.

    Raises:
        BadRecord: the archive is damaged and cannot be read further.
    """
    start = file.tell()
    try:
        with tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as tar:
            for member in tar:
                # tarfile keeps a list of all members, which would grow without bound in a long tar.
                vars(tar)["members"] = []
                if not member.isdir():
                    yield _member(tar, member)
            ending = getattr(tar, "ending", "EOFHeaderError")
        file.seek(start + tar.offset)
    except captions.BadRecord:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError, RecursionError) as error:
        raise _classify(file, start, error) from error
    if ending == "TruncatedHeaderError":
        raise captions.BadRecord("truncated-tar", "ends inside a header.")
    if ending not in ("EOFHeaderError", "EmptyHeaderError"):
        raise captions.BadRecord("damaged-tar", f"has an invalid header ({ending}).")


def _classify(file: IO[bytes], start: int, error: Exception) -> captions.BadRecord:
    """The rejection for an archive that could not be read to its end."""
    file.seek(start)
    head = file.read(tarfile.BLOCKSIZE)
    if head[257:262] != b"ustar":
        if start:
            return captions.BadRecord("damaged-tar", "has bytes behind its end that are no tar.")
        return captions.BadRecord("not-a-tar", "is not a tar file, or compressed: decompress it.")
    if "unexpected end" in str(error):
        return captions.BadRecord("truncated-tar", f"ends too early ({error}).")
    return captions.BadRecord("damaged-tar", f"cannot be read further ({error}).")


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> _Member:
    group, key, ending = _parse_name(member.name)
    try:
        _check_member(member, ending)
        data = b""
        if ending in _IMAGES + _TEXTS:
            content = tar.extractfile(member)
            data = b"" if content is None else content.read()
        return _Member(group, key, ending, data)
    except captions.BadRecord as error:
        return _Member(group, key, ending, error)


def _parse_name(path: str) -> tuple[str, str, str]:
    """Group, key and ending of a member; names in either Unicode form are one."""
    path = unicodedata.normalize("NFC", path)
    folder, slash, name = path.rpartition("/")
    first, _, ending = name.partition(".")
    last, _, last_ending = name.rpartition(".")
    group, key = f"{folder}{slash}{first}", f"{folder}{slash}{last}"
    if last and last_ending.lower() in _IMAGES + _TEXTS:
        return group, key, last_ending.lower()
    return group, group, ending.lower()


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


def _put(sample: _Sample, member: _Member) -> None:
    ending, content = member.ending, member.content
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
        ending, sidecar = _read_caption(sample)
        image = image_decoding.decode(sample.data[ending], ending, min_pixels=2)
    except (captions.BadRecord, image_decoding.BadImage) as error:
        bad = captions.BadRecord(error.reason, str(error))
        return stream.Item(position, reject=bad.as_reject(sample.key))
    segments = (document_types.Text(sidecar.caption), document_types.Image(image.pixels))
    document = document_types.Document(sample.key, segments, sidecar.url, sidecar.license)
    return stream.Item(position, document, notes=image.notes)


def _read_caption(sample: _Sample) -> tuple[str, captions.SidecarCaption]:
    """The ending of the image, and the caption.

    Raises:
        BadRecord: either is missing or bad.
    """
    if sample.image is None:
        raise captions.BadRecord("no-picture", "has no JPEG, PNG or WebP image.")
    return sample.image, captions.check(_fields(sample), sample.key)


def _fields(sample: _Sample) -> dict:
    fields = {}
    if "json" in sample.data:
        fields = captions.parse_json(sample.data["json"])
        if not isinstance(fields, dict):
            raise captions.BadRecord("not-json", "has a .json that is not an object.")
    if "txt" in sample.data:
        fields["caption"] = captions.decode_text(sample.data["txt"])
    return fields
