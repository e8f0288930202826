"""A bucket of Google Cloud Storage inside this process: what `gs://` leads to in tests.

TensorStore, which keeps the arrays of checkpoints, speaks with a small HTTP server on a port of this machine;
all other files go through etils and fsspec. Both see the same objects. As in the real storage there are no
folders, only names with slashes, and an object appears whole or not at all.
"""

import http.server
import io
import itertools
import json
import os
import sys
import threading
import types
import urllib.parse
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

_URL, _TOKEN = "TENSORSTORE_GCS_HTTP_URL", "GOOGLE_AUTH_TOKEN_FOR_TESTING"
# Name, which starts with that of the bucket -> (number of the write, content).
OBJECTS: dict[str, tuple[int, bytes]] = {}
_lock, _generations = threading.RLock(), itertools.count(1)


def put(name: str, data: bytes) -> int:
    """Writes an object, whole."""
    with _lock:
        OBJECTS[name] = (next(_generations), data)
        return OBJECTS[name][0]


def names(prefix: str) -> list[str]:
    """The names of all objects that start with `prefix`, which starts with that of the bucket."""
    with _lock:
        return sorted(name for name in OBJECTS if name.startswith(prefix))


class Bucket(AbstractFileSystem):
    """What etils sees."""

    protocol = ("gs", "gcs")
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("gs://").strip("/")

    def info(self, path: Any, **kwargs: Any) -> dict[str, Any]:
        """The size of an object, or that there are some below."""
        path = self._strip_protocol(path)
        with _lock:
            if path in OBJECTS:
                return {"name": path, "size": len(OBJECTS[path][1]), "type": "file"}
        if names(f"{path}/"):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: Any, detail: bool = True, **kwargs: Any) -> list[Any]:
        """The entries of a folder."""
        path = self._strip_protocol(path)
        if self.info(path)["type"] == "file":
            found = [path]
        else:
            below = (name[len(path) + 1 :].partition("/")[0] for name in names(f"{path}/"))
            found = [f"{path}/{name}" for name in dict.fromkeys(below)]
        return [self.info(name) if detail else name for name in found]

    def mkdir(self, path: Any, create_parents: bool = True, **kwargs: Any) -> None:
        """Nothing: there are no folders."""

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        """Nothing: there are no folders."""

    def rmdir(self, path: Any) -> None:
        """Nothing: there are no folders."""

    def _rm(self, path: Any) -> None:
        with _lock:
            OBJECTS.pop(self._strip_protocol(path), None)

    def cp_file(self, path1: Any, path2: Any, **kwargs: Any) -> None:
        """Copies one object."""
        if self.info(path1)["type"] == "file":
            put(self._strip_protocol(path2), OBJECTS[self._strip_protocol(path1)][1])

    def _open(self, path: Any, mode: str = "rb", **kwargs: Any) -> Any:
        name = self._strip_protocol(path)
        if "r" not in mode:
            return _Writer(name, b"" if "w" in mode else OBJECTS.get(name, (0, b""))[1])
        if self.info(name)["type"] != "file":
            raise IsADirectoryError(name)
        return io.BytesIO(OBJECTS[name][1])


class _Writer(io.BytesIO):
    def __init__(self, name: str, start: bytes):
        super().__init__()
        self.name = name
        self.write(start)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is None:
            self.close()

    def close(self) -> None:
        """Makes the object visible."""
        if not self.closed:
            put(self.name, self.getvalue())
        super().close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """The part of the storage's JSON API that TensorStore uses."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Is silent."""

    def do_GET(self) -> None:
        """Reads or lists."""
        name, query = self._parse()
        if not name.endswith("/"):
            with _lock:
                found = OBJECTS.get(name)
            if found is None:
                return self._send(404)
            if query.get("ifGenerationNotMatch") == str(found[0]):
                return self._send(304)
            return self._send_part(*found)
        with _lock:
            items = [
                {"name": key[len(name) :], "generation": str(OBJECTS[key][0])}
                | {"size": str(len(OBJECTS[key][1]))}
                for key in names(name + query.get("prefix", ""))
            ]
        first, end = query.get("startOffset", ""), query.get("endOffset")
        kept = [
            item for item in items if first <= item["name"] and not (end and item["name"] >= end)
        ]
        return self._send(200, json.dumps({"items": kept}).encode())

    def do_POST(self) -> None:
        """Writes an object, if nobody else wrote it in between."""
        name, query = self._parse()
        data, name = (
            self.rfile.read(int(self.headers.get("Content-Length", 0))),
            name + query["name"],
        )
        with _lock:
            if not self._is_expected(name, query):
                return self._send(412)
            generation = put(name, data)
        return self._send(200, json.dumps({"name": name, "generation": str(generation)}).encode())

    def do_DELETE(self) -> None:
        """Deletes an object."""
        name, query = self._parse()
        with _lock:
            if not self._is_expected(name, query):
                return self._send(412)
            return self._send(404 if OBJECTS.pop(name, None) is None else 204)

    def _parse(self) -> tuple[str, dict[str, str]]:
        """The bucket with a slash and the object's name, which is empty for all, and the query."""
        url = urllib.parse.urlsplit(self.path)
        _, _, rest = url.path.partition("/storage/v1/b/")
        bucket, _, name = rest.partition("/o")
        return f"{bucket}/{urllib.parse.unquote(name.removeprefix('/'))}", dict(
            urllib.parse.parse_qsl(url.query, keep_blank_values=True)
        )

    def _is_expected(self, name: str, query: dict[str, str]) -> bool:
        current = str(OBJECTS.get(name, (0, b""))[0])
        return query.get("ifGenerationMatch", current) == current

    def _send_part(self, generation: int, data: bytes) -> None:
        wanted, status, more = self.headers.get("Range"), 200, {}
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(0, len(data) - int(last))
            stop = int(last) + 1 if first and last else len(data)
            more = {"Content-Range": f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"}
            if start >= len(data):
                return self._send(416)
            status, data = 206, data[start:stop]
        return self._send(status, data, {"x-goog-generation": str(generation), **more})

    def _send(self, status: int, data: bytes = b"", more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(more or {})}.items():
            if status not in (204, 304) or key != "Content-Length":
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)


def start() -> None:
    """Makes `gs://` lead to `OBJECTS` for the rest of this process; calling it again changes nothing."""
    if _URL in os.environ:
        return
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # TensorStore reads them when it first opens a bucket.
    os.environ[_URL] = f"http://127.0.0.1:{server.server_port}"
    os.environ[_TOKEN] = "none"
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    # Orbax asks the bucket's kind of Google's own library.
    storage = types.ModuleType("google.cloud.storage")
    kind = types.SimpleNamespace(hierarchical_namespace_enabled=False)
    client = types.SimpleNamespace(get_bucket=lambda name: kind)
    storage.Client = lambda: client  # type: ignore[attr-defined]
    try:
        import google.cloud as cloud
    except ImportError:
        cloud = sys.modules["google.cloud"] = types.ModuleType("google.cloud")
    cloud.storage = sys.modules["google.cloud.storage"] = storage  # type: ignore[attr-defined]
