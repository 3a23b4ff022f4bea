"""Answers that come piece by piece, as server-sent events."""

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from fastapi.responses import Response

from dsv3_jax.serving.http.asgi import Receive, Scope, Send
from dsv3_jax.serving.http.errors import response_to
from dsv3_jax.serving.http.generation import Generation
from dsv3_jax.serving.http.guard import ClientGone

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """A 200 that sends each object of `events` as it comes, and ends with [DONE].

    A slow reader makes the next piece wait, and nobody else; one that goes away ends the generation. An error behind
    the first piece is an event, since the status is out.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: AsyncIterator[Any]) -> None:
        self.status_code, self.background = 200, None
        self._generation, self._events = generation, events
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._generation:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in self._events:
                    await _send(send, b"data: " + msgspec.json.encode(event) + b"\n\n")
            except ClientGone:
                raise
            except Exception as error:  # noqa: BLE001 - a failing request fails alone
                await _send(send, b"data: " + bytes(response_to(error).body) + b"\n\n")
            await _send(send, DONE, is_last=True)


async def _send(send: Send, data: bytes, *, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": not is_last})
