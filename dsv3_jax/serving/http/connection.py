"""HTTP/1.1 connections, as uvicorn reads them, with this server's answers to what is no HTTP."""

import asyncio
import sys
from http import HTTPStatus

from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv3_jax.serving.http.errors import error_body

HEAD_SECONDS = 30.0
"""Time that a new connection gets to send the head of its first request."""


class Connection(H11Protocol):
    """Closes what sends no request; answers malformed ones in JSON; takes requests to upgrade as plain ones."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Starts the clock."""
        super().connection_made(transport)
        self._patience = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        if self._patience is not None:
            self._patience.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answers what h11 could not read, unless an answer is on its way, and closes."""
        status = HTTPStatus(getattr(sys.exception(), "error_status_hint", 400))
        body = error_body(status, "The headers are too large." if status == 431 else "This is no HTTP/1.1.")
        head = (
            f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(head.encode() + body)
        self.transport.close()

    def _should_upgrade(self) -> bool:
        return False

    def _give_up(self) -> None:
        if self.cycle is None:
            self.transport.close()
