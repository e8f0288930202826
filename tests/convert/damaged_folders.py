"""More than 100 damaged checkpoint folders, each with what the sentence that refuses it must say.

All come from one tiny LLaMA, as one file or as shards with an index. Each group has a rule for the words: the
name of the damaged file, tensor or value, and the kind of damage.
"""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator

import tiny

from rag_mm.convert import shards

LAYERS = 3
WEIGHTS = ("lm_head", "model.embed_tokens", "model.norm")
PARTS = (
    "input_layernorm",
    "post_attention_layernorm",
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
)
PARTS += tuple(f"self_attn.{letter}_proj" for letter in "qkvo")
NORM, QUERY = "model.layers.1.input_layernorm.weight", "model.layers.2.self_attn.q_proj.weight"

Header = dict[str, dict]


@dataclasses.dataclass(frozen=True)
class FolderCase:
    """How a sound folder is damaged.

    Attributes:
        change: does it.
        words: all are in the sentence that refuses the folder; none where it must be accepted.
        is_sharded: whether the folder is of several files.
    """

    change: Callable[[pathlib.Path], object]
    words: tuple[str, ...]
    is_sharded: bool = False


def of_file(change: Callable[[bytes], bytes]) -> Callable[[pathlib.Path], object]:
    """A change of the only safetensors file."""

    def apply(folder: pathlib.Path) -> None:
        path = folder / shards.FILE
        path.write_bytes(change(path.read_bytes()))

    return apply


def split(data: bytes) -> tuple[Header, bytes]:
    """Header and tensors of a file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join(header: bytes, body: bytes, length: int | None = None) -> bytes:
    """A file with this header, which may lie about its length."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def of_header(change: Callable[[Header], object]) -> Callable[[pathlib.Path], object]:
    """A change of the parsed header, in place; the tensors stay."""

    def apply(data: bytes) -> bytes:
        header, body = split(data)
        change(header)
        return join(json.dumps(header).encode(), body)

    return of_file(apply)


def lengths() -> Iterator[tuple[str, FolderCase]]:
    """Cut files, longer ones, and headers whose length is a lie."""
    for length in (0, 1, 7, 8, 9, 100, 1000, -1, -1000):
        cut = of_file(lambda data, length=length: data[:length])
        yield f"cut at {length}", FolderCase(cut, (shards.FILE, "truncated"))
    for more in (1, 8, 4096):
        longer = of_file(lambda data, more=more: data + bytes(more))
        yield f"{more} bytes more", FolderCase(longer, (shards.FILE, "extra bytes"))
    for length in (2**31, 2**63, 2**64 - 1):
        lie = of_file(lambda data, length=length: length.to_bytes(8, "little") + data[8:])
        yield f"a header of {length}", FolderCase(lie, (shards.FILE, "truncated"))
    for length in (0, 1, 2, 500):
        lie = of_file(lambda data, length=length: length.to_bytes(8, "little") + data[8:])
        yield f"a header of {length}", FolderCase(lie, (shards.FILE, "header"))


def headers() -> Iterator[tuple[str, FolderCase]]:
    """Headers that are no JSON object of tensors."""
    texts = {
        "a list": b"[]",
        "null": b"null",
        "a number": b"7",
        "a text": b'"a"',
        "deep": b"[" * 5000,
        "no JSON": b"{]",
        "NaN": b'{"a": NaN}',
        "an infinity": b'{"a": 1e400}',
        "not UTF-8": b'{"\xff": 1}',
        "zeros": bytes(64),
        "a number for a tensor": b'{"a": 1}',
        "null for a tensor": b'{"a": null}',
        "a list for a tensor": b'{"a": []}',
        "an empty tensor": b'{"a": {}}',
    }
    for name, text in texts.items():
        change = of_file(lambda data, text=text: join(text, split(data)[1]))
        yield f"header: {name}", FolderCase(change, (shards.FILE, "header"))
    for name, text in {"no tensors": b"{}", "metadata alone": b'{"__metadata__": {}}'}.items():
        change = of_file(lambda data, text=text: join(text, split(data)[1]))
        yield f"header: {name}", FolderCase(change, (shards.FILE, "extra bytes"))
    for value in ({"a": "b"}, 7, [1]):
        change = of_header(lambda h, value=value: h.update({"__metadata__": value}))
        yield f"unread metadata {value}", FolderCase(change, ())


VALUES = (
    None,
    "x",
    -1,
    {},
    True,
    1.5,
    2**63,
    [-1, -1],
    [1.5, 2],
    ["a", "b"],
    [None, 1],
    [2**63, 2**63],
)


def entries() -> Iterator[tuple[str, FolderCase]]:
    """Every field of a tensor's entry with values that it cannot have, or without it."""
    for key, value in itertools.product(("dtype", "shape", "data_offsets"), VALUES):
        change = of_header(lambda h, key=key, value=value: h[QUERY].update({key: value}))
        yield f"{key} {value!r}", FolderCase(change, (shards.FILE,))
    for key in ("dtype", "shape", "data_offsets"):
        yield (
            f"no {key}",
            FolderCase(of_header(lambda h, key=key: h[QUERY].pop(key)), (shards.FILE, key)),
        )
    for dtype in ("F64", "F16", "BF16", "I8", "F8_E5M2", "BOOL", "f32", "F4", ""):
        change = of_header(lambda h, dtype=dtype: h[QUERY].update(dtype=dtype))
        yield f"dtype {dtype!r}", FolderCase(change, (shards.FILE, QUERY))
    for by in (-4, 4, 4096):
        change = of_header(lambda h, by=by: _move(h, by))
        yield (
            f"moved by {by}",
            FolderCase(change, (shards.FILE, "overlaps another or follows a gap")),
        )
    same = of_header(
        lambda h: h[QUERY].update(data_offsets=h[QUERY.replace("q_", "k_")]["data_offsets"])
    )
    yield (
        "the same place twice",
        FolderCase(same, (shards.FILE, "overlaps another or follows a gap")),
    )


def _move(header: Header, by: int) -> None:
    header[QUERY]["data_offsets"] = [place + by for place in header[QUERY]["data_offsets"]]


def tensors() -> Iterator[tuple[str, FolderCase]]:
    """Tensors that the model has not, lacks, or has in another shape or dtype; the file itself is sound."""
    names = [f"model.layers.{i}.{part}" for i in range(LAYERS) for part in PARTS]
    for name in (*WEIGHTS, *names):
        change = of_header(
            lambda h, name=name: h.update({f"{name}.other": h.pop(f"{name}.weight")})
        )
        yield f"without {name}", FolderCase(change, (f"{name}.weight",))
    for shape in ([32 * 32], [1, 32, 32], [16, 64], [64, 16], [32, 32, 1]):
        change = of_header(lambda h, shape=shape: h[QUERY].update(shape=shape))
        yield f"shape {shape}", FolderCase(change, (QUERY, "shape", str(shape)))
    for dtype in ("I32", "U32"):
        change = of_header(lambda h, dtype=dtype: h[QUERY].update(dtype=dtype))
        yield f"of {dtype}", FolderCase(change, (QUERY, dtype))
    for dtype in ("F16", "BF16"):
        change = of_header(lambda h, dtype=dtype: h[NORM].update(dtype=dtype, shape=[64]))
        yield f"{dtype} of twice the size", FolderCase(change, (NORM,))


def _index(change: Callable[[dict], object]) -> Callable[[pathlib.Path], object]:
    def apply(folder: pathlib.Path) -> None:
        index = json.loads((folder / shards.INDEX).read_text())
        change(index)
        (folder / shards.INDEX).write_text(json.dumps(index))

    return apply


def _shard(folder: pathlib.Path) -> pathlib.Path:
    return folder / json.loads((folder / shards.INDEX).read_text())["weight_map"][QUERY]


def _replace(path: pathlib.Path, kind: str) -> None:
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a link to nothing":
        path.symlink_to("nothing")
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "empty":
        path.write_bytes(b"")


KINDS = ("absent", "a pipe", "a folder", "a link to nothing", "a device", "empty")


def indexes() -> Iterator[tuple[str, FolderCase]]:
    """Indexes that name other files or tensors, and shards that are none."""
    places = [
        "../a.safetensors",
        "/etc/passwd",
        "a\\b.safetensors",
        ".a.safetensors",
        "",
        "..",
        "a\0.safetensors",
    ]
    places += ["a/b.safetensors", 7, None, [], {}, True]
    for place in places:
        change = _index(lambda index, place=place: index["weight_map"].update({QUERY: place}))
        yield f"a shard named {place!r}", FolderCase(change, (QUERY, "not a plain file name"), True)
    for place, words in (
        ("a.bin", "pickle"),
        ("a.pt", "pickle"),
        ("a.h5", "not a safetensors file"),
    ):
        change = _index(lambda index, place=place: index["weight_map"].update({QUERY: place}))
        yield f"a shard named {place!r}", FolderCase(change, (place, words), True)
    for value in ({}, [], None, "x", 3):
        change = _index(lambda index, value=value: index.update(weight_map=value))
        yield f"weight_map {value!r}", FolderCase(change, ("has no weight_map",), True)
    yield (
        "no weight_map",
        FolderCase(_index(lambda index: index.pop("weight_map")), ("has no weight_map",), True),
    )
    other = _index(lambda i: i["weight_map"].update({QUERY: i["weight_map"]["lm_head.weight"]}))
    yield "in another shard", FolderCase(other, (QUERY, "map"), True)
    unmapped = _index(lambda index: index["weight_map"].pop(QUERY))
    yield "not in the index", FolderCase(unmapped, (QUERY, "does not map"), True)
    more = _index(lambda i: i["weight_map"].update({"more": i["weight_map"][QUERY]}))
    yield "in the index alone", FolderCase(more, ("does not hold more",), True)
    for text in (b"", b"{", b"[]", b"null", b"[" * 5000, b"\xff", bytes(64)):
        change = lambda folder, text=text: (folder / shards.INDEX).write_bytes(text)
        yield f"an index of {text[:4]!r}", FolderCase(change, (shards.INDEX,), True)
    for kind in KINDS:
        yield (
            f"a shard {kind}",
            FolderCase(
                lambda folder, kind=kind: _replace(_shard(folder), kind), (".safetensors",), True
            ),
        )
        name = "index.json" if kind != "absent" else "holds neither"
        change = lambda folder, kind=kind: _replace(folder / shards.INDEX, kind)
        yield (
            f"the index {kind}",
            FolderCase(change, (name if kind != "a link to nothing" else "neither",), True),
        )
        change = lambda folder, kind=kind: _replace(folder / shards.FILE, kind)
        yield f"the file {kind}", FolderCase(change, (shards.FILE,))


GROUPS = (lengths, headers, entries, tensors, indexes)


def cases() -> dict[str, FolderCase]:
    """All cases by name."""
    pairs = [pair for group in GROUPS for pair in group()]
    by_name = dict(pairs)
    assert len(by_name) == len(pairs), "two cases have one name"
    return by_name


def write(folder: pathlib.Path, is_sharded: bool) -> pathlib.Path:
    """The sound checkpoint."""
    return tiny.write(folder, "llama", max_bytes=10_000 if is_sharded else 1 << 30)
