"""The page of `rag-mm explore`: search a run's memory, and see beside the hits what its models make of them.

A page of some other site can reach a server on this machine through its reader's browser. So only requests
that name this machine are answered, and only bodies of two content types are read, which a browser lets
no other site send. What documents say reaches the page as JSON, and its script sets it as text.
"""

import dataclasses
import json
import threading
from collections.abc import Callable
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rag_mm.api.session import Session
from rag_mm.core.errors import UserError
from rag_mm.data import image_decoding
from rag_mm.memory import hits, model_protocols

HOSTS = ("127.0.0.1", "localhost")
MAX_HITS = 60
MAX_SEED = (1 << 31) - 1
MAX_UPLOAD = 1 << 25  # 32 MiB; a picture for a search need not be larger.
_MAX_JSON = 1 << 16
_JSON, _PICTURE = "application/json", "application/octet-stream"
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Explorer:
    """What the page asks of a run; each method takes the fields of a request and answers with JSON."""

    session: Session
    name: str
    # Two decodings at once would each take twice as long.
    _decoding: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def search(self, fields: dict[str, Any], image: np.ndarray | None) -> dict[str, Any]:
        """Hits of `text`, of the document with the id `document`, or of a picture, in `view`."""
        view = _text(fields, "view", "mixed" if image is None else "image")
        model_protocols.check_view(view)
        k = _number(fields, "k", 12, 1, MAX_HITS)
        memory = self.session.memory
        if image is not None:
            found = memory.search(image=image, view=view, k=k)
        elif "document" in fields:
            asked = _text(fields, "document")
            if asked not in memory.ids:
                raise UserError(f"The memory has no document with the id {asked!r}.")
            vector = memory.embeddings(view)[memory.ids.index(asked)]
            found = memory.search(vectors=vector[None], view=view, k=k)
        else:
            text = _text(fields, "text")
            if not text.strip():
                raise UserError("The text is empty; say what to look for.")
            found = memory.search(text=text, view=view, k=k)
        return {"view": view, "hits": hits.describe(memory, found)}

    def generate(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A picture of `text`, drawn after reading `docs` retrieved documents."""
        docs, seed = self._docs(fields), _number(fields, "seed", 0, 0, MAX_SEED)
        with self._decoding:
            drawn = self.session.generate(_text(fields, "text"), docs=docs, seed=seed)
        return {"image": hits.data_url(drawn.images[0]), "neighbors": drawn.neighbors}

    def caption(self, fields: dict[str, Any], image: np.ndarray | None) -> dict[str, Any]:
        """A picture in words, written after reading `docs` retrieved documents."""
        if image is None:
            raise UserError("There is no picture to put into words.")
        docs = self._docs(fields)
        with self._decoding:
            written = self.session.caption(image, docs=docs)
        return {"text": written.captions[0], "neighbors": written.neighbors}

    def page(self) -> str:
        """The page itself."""
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        return environment.from_string(_file("explore.html.j2")).render(
            name=self.name,
            num_documents=len(self.session.memory),
            max_docs=self.session.generator.layout.max_docs,
            views=model_protocols.VIEWS,
        )

    def _docs(self, fields: dict[str, Any]) -> int:
        return _number(fields, "docs", 0, 0, self.session.generator.layout.max_docs)


def make_app(session: Session, name: str) -> Starlette:
    """The web application over a loaded run; `name` is what the page calls it."""
    explorer = Explorer(session, name)

    async def search(request: Request) -> Response:
        fields, image = await _read(request)
        return await _answer(lambda: explorer.search(fields, image))

    async def generate(request: Request) -> Response:
        fields, _ = await _read(request)
        return await _answer(lambda: explorer.generate(fields))

    async def caption(request: Request) -> Response:
        fields, image = await _read(request)
        return await _answer(lambda: explorer.caption(fields, image))

    return Starlette(
        routes=[
            _static("/", explorer.page(), "text/html"),
            _static("/explore.css", _file("explore.css"), "text/css"),
            _static("/explore.js", _file("explore.js"), "text/javascript"),
            Route("/search", search, methods=["POST"]),
            Route("/generate", generate, methods=["POST"]),
            Route("/caption", caption, methods=["POST"]),
        ],
        # A name that a stranger's server points to this machine is not one of these.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)],
        exception_handlers={UserError: _refuse, HTTPException: _refuse},
    )


async def _read(request: Request) -> tuple[dict[str, Any], np.ndarray | None]:
    """The fields of a JSON body, or those of the address and the picture that is the body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _JSON:
        return _parse(await _body(request, _MAX_JSON)), None
    if kind == _PICTURE:
        data = await _body(request, MAX_UPLOAD)
        return dict(request.query_params), await run_in_threadpool(_decode, data)
    raise HTTPException(415, f"The body is neither {_JSON} nor {_PICTURE}.")


async def _body(request: Request, limit: int) -> bytes:
    """The body, of which never more than `limit` bytes are held."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise HTTPException(413, f"The body has more than {limit:,} bytes.")
    return bytes(data)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise UserError("The body is not a JSON object.")
    return fields


def _decode(data: bytes) -> np.ndarray:
    try:
        return image_decoding.decode(data).pixels
    except image_decoding.BadPicture as error:
        raise UserError(f"The picture {error}") from None


def _text(fields: dict[str, Any], name: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise UserError(f"The field {name} is missing or no text.")
    return value


def _number(fields: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    try:
        value = int(fields.get(name, default))
    except (TypeError, ValueError, OverflowError):
        value = least - 1
    if not least <= value <= most:
        raise UserError(f"The field {name} is no number from {least} to {most}.")
    return value


async def _answer(work: Callable[[], dict[str, Any]]) -> Response:
    return JSONResponse(await run_in_threadpool(work), headers=_HEADERS)


def _refuse(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 400
    said = error.detail if isinstance(error, HTTPException) else str(error)
    return JSONResponse({"error": said}, status, headers=_HEADERS)


def _static(path: str, content: str, media_type: str) -> Route:
    async def answer(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return Route(path, answer)


def _file(name: str) -> str:
    return resources.files("rag_mm.report").joinpath(name).read_text("utf-8")
