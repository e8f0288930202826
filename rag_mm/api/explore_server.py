"""Web server of `rag-mm explore`: search a run's memory and try its models on the query.

Other users of the machine can reach this server, so the page and its requests need a token, which is in the
address that the command prints, as Jupyter's is. A page of another site can send requests through the user's
browser. Therefore only requests whose Host header names this machine are answered, and only bodies of two
content types that browsers do not send across sites are read. Document text reaches the page as JSON, and the
script inserts it as text only. One request draws and two search at a time; whoever leaves while waiting is
not served.
"""

import dataclasses
import secrets
from collections.abc import Callable
from importlib import resources
from typing import Any

import anyio
import anyio.to_thread
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

from rag_mm.api import steering_options
from rag_mm.api.session import Session
from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.data import image_decoding
from rag_mm.decode import guidance, tasks
from rag_mm.memory import hits, model_protocols

HOSTS = ("127.0.0.1", "localhost")
MAX_HITS = 60
MAX_SEED = (1 << 31) - 1
MAX_CANDIDATES = 16
MAX_UPLOAD = 1 << 25  # 32 MiB, ample for a query image.
_MAX_JSON = 1 << 16
_WATCH_SECONDS = 0.2
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
        """Generates an image of `text`, given `docs` retrieved documents, the best of `best_of` candidates.

        Fields of guidance and contrast are those of `steering_options`.
        """
        generated = self.session.generate(
            _text(fields, "text"),
            docs=self._docs(fields),
            seed=_number(fields, "seed", 0, 0, MAX_SEED),
            best_of=_number(fields, "best_of", 1, 1, MAX_CANDIDATES),
            decoding=_text(fields, "decoding", tasks.SEQUENTIAL),
            **steering_options.parse(fields),
        )
        answer = {"image": hits.data_url(generated.images[0]), "neighbors": generated.neighbors}
        if generated.candidates is None or generated.scores is None:
            return answer
        pairs = zip(generated.candidates[0], generated.scores[0].tolist(), strict=True)
        candidates = [{"image": hits.data_url(image), "score": score} for image, score in pairs]
        return answer | {"candidates": candidates}

    def caption(self, fields: dict[str, Any], image: np.ndarray | None) -> dict[str, Any]:
        """Captions an image, given `docs` retrieved documents."""
        if image is None:
            raise UserError("The request has no image to caption.")
        docs = self._docs(fields)
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
            nulls=tuple(guidance.NULLS),
            decodings=(tasks.SEQUENTIAL, tasks.JACOBI),
            max_candidates=MAX_CANDIDATES,
        )

    def _docs(self, fields: dict[str, Any]) -> int:
        return _number(fields, "docs", 0, 0, self.session.generator.layout.max_docs)


def make_app(session: Session, name: str, token: str) -> Starlette:
    """The web application for a loaded run.

    Args:
        session: the run.
        name: the page's title for it.
        token: what the page's address must hold, as `?token=`, and each request of the page.
    """
    explorer = Explorer(session, name)
    # Two pictures or drawings at once would each take twice as long, and twice the memory.
    uploads, drawings, searches = (anyio.CapacityLimiter(count) for count in (1, 1, 2))

    async def search(request: Request) -> Response:
        fields, image = await _read(request, token, uploads)
        return await _respond(request, searches, lambda: explorer.search(fields, image))

    async def generate(request: Request) -> Response:
        fields, _ = await _read(request, token, uploads)
        return await _respond(request, drawings, lambda: explorer.generate(fields))

    async def caption(request: Request) -> Response:
        fields, image = await _read(request, token, uploads)
        return await _respond(request, drawings, lambda: explorer.caption(fields, image))

    async def page(request: Request) -> Response:
        _check(request.query_params.get("token", ""), token)
        return Response(explorer.page(), media_type="text/html", headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/", page),
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


def _check(given: str, token: str) -> None:
    """Raises HTTPException, before anything else of a request is read, unless it holds the token."""
    if not secrets.compare_digest(given.encode(), token.encode()):
        raise HTTPException(403, "Open the address that rag-mm explore printed, with its token.")


async def _read(
    request: Request, token: str, uploads: anyio.CapacityLimiter
) -> tuple[dict[str, Any], np.ndarray | None]:
    """The fields of a JSON body; or, for an image body, the fields of the URL and the image."""
    _check(request.headers.get("authorization", "").removeprefix("Bearer "), token)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == _JSON:
        return _parse(await _body(request, _MAX_JSON)), None
    if content_type == _IMAGE:
        # Waits before it reads, so that waiting requests take no memory.
        async with uploads:
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
        fields = files.parse_json(data)
    except ValueError:
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


async def _respond(
    request: Request, slots: anyio.CapacityLimiter, work: Callable[[], dict[str, Any]]
) -> Response:
    """The answer of `work`, which runs in a thread once there is a slot; never, if the reader left before."""
    answer: dict[str, Any] = {}
    failure: Exception | None = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while not await request.is_disconnected():
                await anyio.sleep(_WATCH_SECONDS)
            group.cancel_scope.cancel()  # Ends the wait for a slot; what already runs is waited for.

        group.start_soon(watch)
        try:
            answer = await anyio.to_thread.run_sync(work, limiter=slots)
        except Exception as error:  # Outside, it would be one of a group.
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return JSONResponse(answer, headers=_HEADERS)


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
