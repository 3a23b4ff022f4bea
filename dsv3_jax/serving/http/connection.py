"""HTTP/1.1 connections, as uvicorn reads them, with this server's answers to what is no HTTP."""

import asyncio
import sys
from http import HTTPStatus

from uvicorn.protocols.http.h11_impl import H11Protocol

from dsv3_jax.serving.http.errors import error_body

HEAD_SECONDS = 30.0
"""Time that a new connection gets to send the head of its first request."""

READ_SECONDS = 60.0
"""Time that a client gets to read what fills its connection (64 KiB behind the system's own buffers)."""


class Connection(H11Protocol):
    """Closes what sends no request or reads no answer; answers malformed requests in JSON; upgrades nothing."""

    _patience: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Starts the clock."""
        super().connection_made(transport)
        self._patience = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clocks."""
        for clock in (self._patience, self._reading):
            if clock is not None:
                clock.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Waits for the client to read, not for ever."""
        super().pause_writing()
        self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        if self._reading is not None:
            self._reading.cancel()
        super().resume_writing()

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
