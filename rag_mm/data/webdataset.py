"""Untrusted WebDataset tars: read sequentially, never extracted, every member checked."""

import itertools
import os
import pathlib
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO

from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.data import captions, file_names, tar_samples
from rag_mm.memory.writing import stream

REJECT_REASONS = {
    "link": "a symbolic or hard link",
    "device": "a device or a pipe",
    "sparse-member": "a sparse file, which claims more bytes than it holds",
    "oversized-member": "an image or text file above the size limit",
    "truncated-tar": "the file ends before its last member does",
    "damaged-tar": "an invalid header",
    "not-a-tar": "not a tar file, or a compressed one",
}
MAX_MEMBER_BYTES = 1 << 26
# Part of the fingerprint: a build begun under other rules counts other samples, so it cannot be resumed.
_RULES = "dots in names, joined archives, shards in ids, no system files, segments"
MAX_HEADER_BYTES = 1 << 15
# Headers that hold long names and other settings of the next member: of pax, of Solaris and of GNU tar.
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_CHUNK = 1 << 20
_BITS = 40  # A position is the tar's number and, in its low bits, the number of items read from it.


class _Header(tarfile.TarInfo):
    """A header that records how the archive ended, and that takes no more memory and time than names need."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENSIONS and not 0 <= header.size <= MAX_HEADER_BYTES:
            raise captions.BadRecord(
                "damaged-tar",
                f"has a header of {header.size:,} bytes; at most {MAX_HEADER_BYTES:,} are read.",
            )
        return header

    def _proc_gnusparse_10(self, next, *rest):
        # tarfile would look for the end of the list of holes past the end of the file, for ever. The member
        # is rejected as any sparse one is, without the list.
        next.sparse = []

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:  # tarfile treats some of these as the archive's end.
            tar.ending = type(error).__name__
            raise


class TarSource:
    """Samples of one or more tars: an image with its caption in `.txt` or `.json`, grouped by key.

    The key is a member's path up to the first dot of its name; it becomes the document's id, after the name
    of its tar where there are several (`file_names.prefixes_of_shards`). Where an image and its caption share
    further dots (`view 1.4.jpg`, `view 1.4.txt`), they are a sample of their own; other members with further
    dots (`000.mask.png` beside `000.jpg`) are not read. `.json` may hold `caption`, `url` and `license`; a
    caption in `.txt` takes precedence. Archives joined into one file are all read.

    A `.json` may instead hold a document of any segments (`document_json`), which name the sample's images by
    what follows the key's dot: in `000.json`, `{"image": "0.jpg"}` is the member `000.0.jpg` and
    `{"image": "jpg"}` is `000.jpg`. Its id is the key if it gives none, and `.txt` is not read. An image that
    has a caption of its own (`000.0.txt`) is a sample of its own and cannot be named.

    Files of the system (`._000.jpg`, `.DS_Store`) and about the samples (`LICENSE`, `README.md`) are no
    samples.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        """Opens no file yet.

        Raises:
            UserError: there are no paths, or one is not a file.
        """
        self._paths = sorted(pathlib.Path(path) for path in paths)
        if not self._paths:
            raise UserError("There are no tars to read.")
        self._prefixes = file_names.prefixes_of_shards(self._paths)
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
            samples = _samples(self._paths[number], self._prefixes[number])
            for count, sample in enumerate(samples, start=1):
                if count > skipped:
                    yield tar_samples.make_item((number << _BITS) + count, sample)
            skipped = 0

    def __repr__(self) -> str:
        return f"TarSource({[str(path) for path in self._paths]})"


def _samples(path: pathlib.Path, prefix: str) -> Iterator[tar_samples.Sample]:
    with path.open("rb") as file:
        has_more = True
        try:
            while has_more:
                for _, members in itertools.groupby(_members(file), lambda member: member.group):
                    for sample in tar_samples.split(members):
                        sample.key = prefix + sample.key
                        yield sample
                has_more = _find_next(file)
        except captions.BadRecord as error:
            # The sample before it may be incomplete, such as without its license, so it is dropped too.
            yield tar_samples.Sample(path.name, bad=error)


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


def _members(file: IO[bytes]) -> Iterator[tar_samples.Member]:
    """The files of the archive that begins here; leaves `file` at the archive's end.

    Raises:
        BadRecord: the archive is damaged and cannot be read further.
    """
    start = file.tell()
    size = os.fstat(file.fileno()).st_size - start
    end = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    try:
        with tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as tar:
            for member in tar:
                # tarfile keeps a list of all members, which would grow without bound in a long tar.
                vars(tar)["members"] = []
                if tar.offset > end:  # tarfile would read on, block by block, for ever.
                    raise captions.BadRecord(
                        "truncated-tar",
                        f"ends too early: {member.name!r} claims {member.size:,} bytes.",
                    )
                if not member.isdir() and not file_names.is_system_file(member.name):
                    yield _member(tar, member)
            ending = getattr(tar, "ending", "EOFHeaderError")
        file.seek(start + tar.offset)
    except captions.BadRecord:
        raise
    except (tarfile.TarError, EOFError, OSError, ArithmeticError, LookupError, ValueError) as error:
        raise _classify(file, start, error) from error
    except RecursionError as error:  # headers of headers of headers
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


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tar_samples.Member:
    group, key, ending = tar_samples.parse_name(member.name)
    try:
        _check_member(member, ending)
        data = b""
        if ending in tar_samples.IMAGES + tar_samples.TEXTS:
            content = tar.extractfile(member)
            data = b"" if content is None else content.read()
        return tar_samples.Member(group, key, ending, data)
    except captions.BadRecord as error:
        return tar_samples.Member(group, key, ending, error)


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
    limit = captions.MAX_TEXT_BYTES if ending in tar_samples.TEXTS else MAX_MEMBER_BYTES
    if ending in tar_samples.IMAGES + tar_samples.TEXTS and member.size > limit:
        raise captions.BadRecord(
            "oversized-member",
            f"has {member.size:,} bytes in .{ending}; at most {limit:,} are read.",
        )
