"""Web server of `rag-mm explore`: search a run's memory and try its models on the query.

Other users of the machine can reach this server, so the page and its requests need a token, which is in the
address that the command prints, as Jupyter's is. A page of another site can send requests through the user's
browser. Therefore only requests whose Host header names this machine are answered, and only bodies of two
content types that browsers do not send across sites are read. Document text reaches the page as JSON, and the
script inserts it as text only. One request draws and two search at a time; whoever leaves while waiting is
not served.
"""

import re
import secrets
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rag_mm.api.explore_requests import Explorer, page_file
from rag_mm.api.session import Session
from rag_mm.core import files
from rag_mm.core.errors import UserError
from rag_mm.data import image_decoding

Fields = dict[str, Any]
Images = list[np.ndarray]
HOSTS = ("127.0.0.1", "localhost")
MAX_UPLOAD = 1 << 25  # 32 MiB, ample for two query images.
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

    def answer(
        path: str, slots: anyio.CapacityLimiter, work: Callable[[Fields, Images], dict[str, Any]]
    ) -> Route:
        async def respond(request: Request) -> Response:
            fields, images = await _read(request, token, uploads)
            return await _respond(request, slots, lambda: work(fields, images))

        return Route(path, respond, methods=["POST"])

    async def page(request: Request) -> Response:
        _check(request.query_params.get("token", ""), token)
        return Response(explorer.page(), media_type="text/html", headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/", page),
            _static("/explore.css", page_file("explore.css"), "text/css"),
            _static("/explore.js", page_file("explore.js"), "text/javascript"),
            answer("/search", searches, explorer.search),
            answer("/generate", drawings, explorer.generate),
            answer("/caption", drawings, explorer.caption),
            answer("/edit", drawings, explorer.edit),
            answer("/ask", drawings, explorer.ask),
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
) -> tuple[Fields, Images]:
    """The fields of a JSON body; or, for a body of images, the fields of the URL and the images.

    Of two images, the field `first` is the number of bytes of the first.
    """
    _check(request.headers.get("authorization", "").removeprefix("Bearer "), token)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == _JSON:
        return _parse(await _body(request, _MAX_JSON)), []
    if content_type == _IMAGE:
        # Waits before it reads, so that waiting requests take no memory.
        async with uploads:
            data = await _body(request, MAX_UPLOAD)
            fields = dict(request.query_params)
            return fields, await run_in_threadpool(_decode, _split(data, fields))
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


def _split(data: bytes, fields: Fields) -> list[bytes]:
    """The files of a body, one or two."""
    if "first" not in fields:
        return [data]
    size = fields["first"]
    if not re.fullmatch(r"[0-9]{1,9}", size) or not 0 < int(size) < len(data):
        raise UserError("The field first is not the number of bytes of the first of two images.")
    return [data[: int(size)], data[int(size) :]]


def _decode(datas: list[bytes]) -> list[np.ndarray]:
    try:
        return [image_decoding.decode(data).pixels for data in datas]
    except image_decoding.BadImage as error:
        raise UserError(f"The file {error}") from None


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
