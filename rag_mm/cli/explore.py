"""`rag-mm explore`: one page on this machine, to search a run's memory and see what its models make of it."""

import argparse
import contextlib
import importlib.util
import pathlib
import socket
from typing import Any

import rich.console

from rag_mm.cli import session_args
from rag_mm.core import progress
from rag_mm.core.errors import UserError

_HOST = "127.0.0.1"  # Nobody else's machine may ask: there is no login.
_LIBRARIES = ("starlette", "uvicorn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the run and the port."""
    parser.add_argument("run", metavar="RUN", help="a finished run")
    parser.add_argument(
        "--port", type=int, default=8765, help="on 127.0.0.1; 0 takes a free one (default: 8765)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Serves until it is interrupted; `address` was the page's."""
    if not 0 <= args.port < 1 << 16:
        raise UserError(f"--port={args.port} is no port; give 0 to 65535.")
    for name in _LIBRARIES:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install '.[explore]' brings it.")
    with _listen(args.port) as listener:
        session = session_args.load_session(args.run)
        listener.listen()  # From here on a browser waits for its answer and is not turned away.
        address = f"http://{_HOST}:{listener.getsockname()[1]}"
        progress.say(f"{args.run}: {address} (Ctrl-C ends it)")
        _serve(session, pathlib.Path(args.run).resolve().name, listener)
    return {"address": address}


def show(result: dict[str, Any], console: rich.console.Console) -> None:
    """Says that it has ended."""
    console.print(f"{result['address']} is closed.", markup=False)


def _listen(port: int) -> socket.socket:
    """The socket, before minutes of loading: a port in use is a mistake."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_HOST, port))
    except OSError as error:
        listener.close()
        raise UserError(f"Port {port} cannot be had ({error.strerror}); name another.") from None
    return listener


def _serve(session: Any, name: str, listener: socket.socket) -> None:
    import uvicorn

    from rag_mm.api import explore_server

    app = explore_server.make_app(session, name)
    # No log of requests: what was searched for is nobody's business, nor are proxies expected.
    config = uvicorn.Config(app, log_level="warning", access_log=False, proxy_headers=False)
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
