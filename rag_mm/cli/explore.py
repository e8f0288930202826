"""`rag-mm explore`: local web page to search a run's memory and try its models."""

import argparse
import contextlib
import importlib.util
import pathlib
import secrets
import socket
from typing import Any

import rich.console

from rag_mm.cli import session_args
from rag_mm.core import progress
from rag_mm.core.errors import UserError

_HOST = "127.0.0.1"  # Reachable from this machine only; its other users lack the token.
_SHUTDOWN_SECONDS = 3  # What is drawn by then is waited for, what waits is not.
_LIBRARIES = ("starlette", "uvicorn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `rag-mm explore`."""
    parser.add_argument("run", metavar="RUN", help="finished run")
    session_args.add_mesh(parser)
    session_args.add_stage(parser)
    parser.add_argument(
        "--port",
        type=int,
        default=8765,
        help="port on 127.0.0.1; 0 picks a free one (default: 8765)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serves until interrupted. Returns `address`, the page's URL without its token."""
    if not 0 <= args.port < 1 << 16:
        raise UserError(f"--port={args.port} is not a port; give 0 to 65535.")
    for name in _LIBRARIES:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed; run pip install '.[explore]'.")
    with _listen(args.port) as listener:
        session = session_args.load_session(args, args.run)
        listener.listen()  # From here on a browser waits for its answer instead of being refused.
        address = f"http://{_HOST}:{listener.getsockname()[1]}"
        token = secrets.token_urlsafe(24)
        progress.say(f"{args.run}: {address}/?token={token} (press Ctrl-C to stop)")
        _serve(session, pathlib.Path(args.run).resolve().name, token, listener)
    return {"address": address}


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Prints that the server has stopped."""
    console.print(f"{result['address']} has stopped.", markup=False)


def _listen(port: int) -> socket.socket:
    """Binds the port before the minutes of loading, so that a port in use is reported at once."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_HOST, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"Port {port} is not available ({error.strerror}); choose another with --port."
        ) from None
    return listener


def _serve(session: Any, name: str, token: str, listener: socket.socket) -> None:
    import uvicorn

    from rag_mm.api import explore_connections, explore_server

    app = explore_server.make_app(session, name, token)
    # No request log, since queries are private, and no proxy headers, since no proxy is expected.
    config = uvicorn.Config(
        app,
        http=explore_connections.make_protocol(),
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
