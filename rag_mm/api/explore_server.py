"""Web server of `rag-mm explore`: search a run's memory and try its models on the query.

A page of another site can send requests to this server through the user's browser. Therefore only requests
whose Host header names this machine are answered, and only bodies of two content types that browsers do not
send across sites are read. Document text reaches the page as JSON, and the script inserts it as text only.
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
MAX_UPLOAD = 1 << 25  # 32 MiB, ample for a query image.
_MAX_JSON = 1 << 16
_JSON, _IMAGE = "application/json", "application/octet-stream"
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
    """The requests that the page makes; each method takes the request's fields and returns JSON values."""

    session: Session
    name: str
    # Only one decoding at a time: two at once would each take twice as long.
    _decoding: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def search(self, fields: dict[str, Any], image: np.ndarray | None) -> dict[str, Any]:
        """Hits in `view` for a text, for the document with id `document`, or for an image."""
        view = _text(fields, "view", "mixed" if image is None else "image")
        model_protocols.check_view(view)
        k = _number(fields, "k", 12, 1, MAX_HITS)
        memory = self.session.memory
        if image is not None:
            results = memory.search(image=image, view=view, k=k)
        elif "document" in fields:
            document_id = _text(fields, "document")
            if document_id not in memory.ids:
                raise UserError(f"The memory has no document with the id {document_id!r}.")
            vector = memory.embeddings(view)[memory.ids.index(document_id)]
            results = memory.search(vectors=vector[None], view=view, k=k)
        else:
            text = _text(fields, "text")
            if not text.strip():
                raise UserError("The text is empty; enter a query.")
            results = memory.search(text=text, view=view, k=k)
        return {"view": view, "hits": hits.describe(memory, results)}

    def generate(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Generates an image of `text`, given `docs` retrieved documents."""
        docs, seed = self._docs(fields), _number(fields, "seed", 0, 0, MAX_SEED)
        with self._decoding:
            generated = self.session.generate(_text(fields, "text"), docs=docs, seed=seed)
        return {"image": hits.data_url(generated.images[0]), "neighbors": generated.neighbors}

    def caption(self, fields: dict[str, Any], image: np.ndarray | None) -> dict[str, Any]:
        """Captions an image, given `docs` retrieved documents."""
        if image is None:
            raise UserError("The request has no image to caption.")
        docs = self._docs(fields)
        with self._decoding:
            generated = self.session.caption(image, docs=docs)
        return {"text": generated.captions[0], "neighbors": generated.neighbors}

    def page(self) -> str:
        """The HTML page."""
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
    """The web application for a loaded run; `name` is the page's title for it."""
    explorer = Explorer(session, name)

    async def search(request: Request) -> Response:
        fields, image = await _read(request)
        return await _respond(lambda: explorer.search(fields, image))

    async def generate(request: Request) -> Response:
        fields, _ = await _read(request)
        return await _respond(lambda: explorer.generate(fields))

    async def caption(request: Request) -> Response:
        fields, image = await _read(request)
        return await _respond(lambda: explorer.caption(fields, image))

    return Starlette(
        routes=[
            _static("/", explorer.page(), "text/html"),
            _static("/explore.css", _file("explore.css"), "text/css"),
            _static("/explore.js", _file("explore.js"), "text/javascript"),
            Route("/search", search, methods=["POST"]),
            Route("/generate", generate, methods=["POST"]),
            Route("/caption", caption, methods=["POST"]),
        ],
        # Refuses other host names that resolve to this machine (DNS rebinding).
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)],
        exception_handlers={UserError: _error_response, HTTPException: _error_response},
    )


async def _read(request: Request) -> tuple[dict[str, Any], np.ndarray | None]:
    """The fields of a JSON body; or, for an image body, the fields of the URL and the image."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == _JSON:
        return _parse(await _body(request, _MAX_JSON)), None
    if content_type == _IMAGE:
        data = await _body(request, MAX_UPLOAD)
        return dict(request.query_params), await run_in_threadpool(_decode, data)
    raise HTTPException(415, f"The body is neither {_JSON} nor {_IMAGE}.")


async def _body(request: Request, limit: int) -> bytes:
    """The request's body, refused as soon as it exceeds `limit` bytes."""
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
    except image_decoding.BadImage as error:
        raise UserError(f"The file {error}") from None


def _text(fields: dict[str, Any], name: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise UserError(f"The field {name} is missing or not a text.")
    return value


def _number(fields: dict[str, Any], name: str, default: int, minimum: int, maximum: int) -> int:
    try:
        value = int(fields.get(name, default))
    except (TypeError, ValueError, OverflowError):
        value = minimum - 1
    if not minimum <= value <= maximum:
        raise UserError(f"The field {name} must be an integer from {minimum} to {maximum}.")
    return value


async def _respond(work: Callable[[], dict[str, Any]]) -> Response:
    return JSONResponse(await run_in_threadpool(work), headers=_HEADERS)


def _error_response(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 400
    message = error.detail if isinstance(error, HTTPException) else str(error)
    return JSONResponse({"error": message}, status, headers=_HEADERS)


def _static(path: str, content: str, media_type: str) -> Route:
    async def respond(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return Route(path, respond)


def _file(name: str) -> str:
    return resources.files("rag_mm.report").joinpath(name).read_text("utf-8")
