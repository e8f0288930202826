"""More than 60 tars, each with the documents and rejects that are read from it.

Most hold the samples 0 to 3, and what is changed begins at sample 2. As a sample ends where the next one
begins, sample 1 cannot be told to be complete where the archive is damaged at sample 2; it is not read.
"""

import bz2
import dataclasses
import gzip
import io
import itertools
import json
import lzma
import tarfile
import unicodedata
from collections.abc import Callable, Iterator

import hostile
from hostile import member, sample
from test_hostile_tar import BAD_HEADERS

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
PICTURES = [hostile.encoded(hostile.pixels(i, 30, 30)) for i in range(4)]
PNG, JPEG = PICTURES[0], hostile.encoded(hostile.pixels(), "JPEG")
SHADOW = b"\0\x05\x16\x07\0\x02\0\0Mac OS X        " + bytes(120)


@dataclasses.dataclass(frozen=True)
class TarCase:
    """Tars by name, and what is read from them in order: (id, caption) and (name, reason code) of rejects."""

    files: dict[str, bytes]
    documents: tuple[tuple[str, str], ...]
    rejects: tuple[tuple[str, str], ...] = ()


def archive(fill: Callable, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar with the members that `fill(tar)` adds."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        fill(tar)
    return buffer.getvalue()


def named(*names: str) -> tuple[tuple[str, str], ...]:
    """The documents of these names in the tars of `plain`."""
    return tuple((name, f"caption of {name}") for name in names)


def plain(*names: str, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of samples by name."""

    def fill(tar):
        for i, name in enumerate(names):
            sample(tar, name, PICTURES[i % 4], f"caption of {name}".encode())

    return archive(fill, tar_format)


def sound() -> Iterator[tuple[str, TarCase]]:
    """Names that the three formats store in different ways."""
    names = {
        "plain": ("0", "1"),
        "in folders": ("a/0", "a/1", "b/c/0"),
        "long": tuple(f"{'folder/' * 12}{'n' * 60}{i}" for i in range(3)),
        "of any script": ("é", "猫", "тест 1"),
        "with spaces and signs": ("a b", "#%?", "[x]*", "-dash", "~"),
        "one sample": ("only",),
        "none": (),
    }
    for (name, keys), form in itertools.product(names.items(), FORMATS):
        data = plain(*keys, tar_format=FORMATS[form])
        yield f"{form} {name}", TarCase({"a.tar": data}, named(*keys))


def _at(change: Callable[[bytes, int], bytes]) -> Callable[[bytes], bytes]:
    """The change at the header of sample 2."""
    return lambda data: change(data, _start(data))


def _start(data: bytes) -> int:
    """Where the header of sample 2 begins."""
    return data.index(b"2.png\0") // 512 * 512


def _with_size(data: bytes, place: int, size: bytes) -> bytes:
    """Another text as the header's size, under a right checksum."""
    header = bytearray(data[place : place + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:place] + bytes(header) + data[place + 512 :]


# What is done to a tar of four samples: (the change, the samples that are read, the reason or none).
FEW, ALL = ("0",), ("0", "1", "2", "3")
DAMAGE = {
    "cut in a member": (_at(lambda d, i: d[: i + 700]), FEW, "truncated-tar"),
    "cut in a header": (_at(lambda d, i: d[: i + 100]), FEW, "truncated-tar"),
    "a header of ones": (
        _at(lambda d, i: d[:i] + b"\xff" * 512 + d[i + 512 :]),
        FEW,
        "damaged-tar",
    ),
    "a header of text": (
        _at(lambda d, i: d[:i] + b"text " * 102 + b".." + d[i + 512 :]),
        FEW,
        "damaged-tar",
    ),
    "another name": (_at(lambda d, i: d[:i] + b"7" + d[i + 1 :]), FEW, "damaged-tar"),
    "another checksum": (_at(lambda d, i: d[: i + 148] + b"7" + d[i + 149 :]), FEW, "damaged-tar"),
    "another mode": (_at(lambda d, i: d[: i + 100] + b"7" + d[i + 101 :]), FEW, "damaged-tar"),
    "a size beyond the end": (
        _at(lambda d, i: _with_size(d, i, b"77777777777\0")),
        FEW,
        "truncated-tar",
    ),
    "a size of letters": (_at(lambda d, i: _with_size(d, i, b"letters only")), FEW, "damaged-tar"),
    "a lost block": (_at(lambda d, i: d[:i] + d[i + 512 :]), FEW, "damaged-tar"),
    "a block of ones between": (
        _at(lambda d, i: d[:i] + b"\xff" * 512 + d[i:]),
        FEW,
        "damaged-tar",
    ),
    "zeros between": (_at(lambda d, i: d[:i] + bytes(1024) + d[i:]), ALL, ""),
    "without its end": (lambda d: d.rstrip(b"\0") + bytes(-len(d.rstrip(b"\0")) % 512), ALL, ""),
    "bytes behind its end": (lambda d: d + b"lost" * 1000, ALL, "damaged-tar"),
    "zeros behind its end": (lambda d: d + bytes(1 << 20), ALL, ""),
}


def damaged() -> Iterator[tuple[str, TarCase]]:
    """Each damage in each format; the tar behind it is read whole."""
    for (name, (change, ids, reason)), form in itertools.product(DAMAGE.items(), ("ustar", "gnu")):
        data = plain("0", "1", "2", "3", tar_format=FORMATS[form])
        files = {"a.tar": change(data), "b.tar": plain("x", "y")}
        documents = [(f"a/{key}", text) for key, text in named(*ids)]
        documents += [(f"b/{key}", text) for key, text in named("x", "y")]
        rejects = (("a.tar", reason),) if reason else ()
        yield f"{form}: {name}", TarCase(files, tuple(documents), rejects)


def headers() -> Iterator[tuple[str, TarCase]]:
    """A member that is no file, or leads elsewhere, between two samples."""
    for name, (reason, changes) in BAD_HEADERS.items():

        def fill(tar, name=name, changes=changes):
            sample(tar, "good", PNG, b"caption of good")
            sample(tar, name, PNG, b"caption", **changes)
            sample(tar, "last", PNG, b"caption of last")

        yield name, TarCase({"a.tar": archive(fill)}, named("good", "last"), ((name, reason),))


def no_tars() -> Iterator[tuple[str, TarCase]]:
    """Other files that end in .tar."""
    data = plain("0", "1")
    others = {"gzip": gzip.compress(data), "bzip2": bz2.compress(data), "xz": lzma.compress(data)}
    others |= {
        "png": PNG,
        "zip": b"PK\3\4" + bytes(600),
        "text": b"a caption\n" * 100,
        "byte": b"\1",
    }
    for name, content in others.items():
        yield name, TarCase({"a.tar": content}, (), (("a.tar", "not-a-tar"),))


def _mac(tar):
    member(tar, "._.", SHADOW)
    for name in ("0", "1"):
        for ending, data in (("png", PNG), ("txt", f"caption of {name}".encode())):
            member(tar, f"._{name}.{ending}", SHADOW)
            more = {"LIBARCHIVE.xattr.com.apple.provenance": "AQIA"}
            member(tar, f"{name}.{ending}", data, pax_headers=more)


def _extras(tar):
    for name in ("LICENSE", "README.md", ".DS_Store", "__meta__/info.json"):
        member(tar, name, b"text")
    for name in ("0", "1"):
        sample(tar, name, PNG, f"caption of {name}".encode())


def _unsorted(tar):
    for name in ("0", "1"):
        member(tar, f"{name}.png", PNG)
    for name in ("0", "1"):
        member(tar, f"{name}.txt", b"text")


def _img2dataset(tar):
    for name in ("0", "1"):
        sample(tar, name, PNG, f"caption of {name}".encode())
        fields = {"caption": "another", "url": f"http://a/{name}", "key": name, "license": None}
        fields |= {"error_message": None, "similarity": float("nan"), "exif": "{}", "width": 40}
        member(tar, f"{name}.json", json.dumps(fields).encode())


def _from_windows(tar):
    member(tar, "0.PNG", PNG)
    member(tar, "0.TXT", b"\xef\xbb\xbfcaption of 0\r\n")
    member(tar, "1.JPEG", JPEG)
    member(tar, "1.JSON", b'\xef\xbb\xbf{"caption": "caption of 1"}\r\n')


def _dots(tar):
    for name in ("photo v1.4", "photo v1.5"):
        sample(tar, name, PNG, f"caption of {name}".encode())


def _fields(tar):
    for name in ("0", "1"):
        sample(tar, name, PNG, f"caption of {name}".encode())
        member(tar, f"{name}.mask.png", PNG)
        member(tar, f"{name}.npy", bytes(100))


def _forms(tar):
    member(tar, unicodedata.normalize("NFD", "é.png"), PNG)
    member(tar, unicodedata.normalize("NFC", "é.txt"), "caption of é".encode())


def tools() -> Iterator[tuple[str, TarCase]]:
    """Tars as people's tools make them."""
    for name, fill, keys in (
        ("a Mac's", _mac, ("0", "1")),
        ("with files about it", _extras, ("0", "1")),
        ("img2dataset's", _img2dataset, ("0", "1")),
        ("from Windows", _from_windows, ("0", "1")),
        ("dots in names", _dots, ("photo v1.4", "photo v1.5")),
        ("further fields", _fields, ("0", "1")),
        ("two forms of a name", _forms, ("é",)),
    ):
        yield name, TarCase({"a.tar": archive(fill)}, named(*keys))
    apart = [(name, "empty-caption") for name in ("0", "1")]
    apart += [(name, "no-picture") for name in ("0", "1")]
    yield "pictures apart from captions", TarCase({"a.tar": archive(_unsorted)}, (), tuple(apart))
    joined = plain("0", "1") + plain("2")
    yield "joined", TarCase({"a.tar": joined}, named("0", "1", "2"))
    same = {"a.tar": plain("0"), "b.tar": plain("0")}
    both = (("a/0", "caption of 0"), ("b/0", "caption of 0"))
    yield "two tars of the same names", TarCase(same, both)


GROUPS = (sound, damaged, headers, no_tars, tools)


def cases() -> dict[str, TarCase]:
    """All cases by name."""
    pairs = [pair for group in GROUPS for pair in group()]
    by_name = dict(pairs)
    assert len(by_name) == len(pairs), "two cases have one name"
    return by_name
