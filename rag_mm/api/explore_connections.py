"""Connections of `rag-mm explore`: few at once, and none that is only held open."""

import asyncio
from typing import Any

MAX_CONNECTIONS = 64
READ_SECONDS = 20.0
"""A request, with its body, must have arrived in that time."""


def make_protocol(read_seconds: float = READ_SECONDS) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which by itself waits for ever for the rest of a request, with limits."""
    from uvicorn.protocols.http import h11_impl  # Imported here because the extra is optional.

    class ImpatientProtocol(h11_impl.H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > MAX_CONNECTIONS:
                transport.close()
            else:
                self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait()  # The next request gets its own time.

        def _wait(self) -> None:
            self._stop()
            self._timer = self.loop.call_later(read_seconds, self._give_up)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()

        def _give_up(self) -> None:
            if self.transport.is_closing():
                return
            if self.conn.their_state in (h11_impl.h11.IDLE, h11_impl.h11.SEND_BODY):
                self.transport.close()
            else:  # The request is whole, and its answer takes time.
                self._wait()

    return ImpatientProtocol
