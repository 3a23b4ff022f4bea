"""One call's completions, from the engine's thread to the event loop."""

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from dsv3_jax.serving.errors import Unavailable
from dsv3_jax.serving.http.asgi import Receive
from dsv3_jax.serving.http.guard import ClientGone
from dsv3_jax.serving.http.logs import REQUEST_ID
from dsv3_jax.serving.outputs import Delta
from dsv3_jax.serving.params import SamplingParams

if TYPE_CHECKING:
    from dsv3_jax.serving.engine import Engine


class Inbox:
    """Takes pieces from any thread, gives them on the event loop, and wakes it once for many."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        self._pieces: collections.deque[Delta] = collections.deque()
        self._is_woken = False
        self.is_abandoned = False

    def put(self, piece: Delta) -> None:
        """Adds a piece; after the loop has ended, drops it."""
        self._pieces.append(piece)
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._arrived.set)

    def abandon(self) -> None:
        """The reader should stop; on the event loop only."""
        self.is_abandoned = True
        self._arrived.set()

    async def take(self) -> list[Delta]:
        """What has arrived, at least one piece.

        Raises:
            ClientGone: after `abandon`.
        """
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            self._is_woken = False  # before the pieces are taken: what comes later wakes again
            if self.is_abandoned:
                raise ClientGone
            pieces = [self._pieces.popleft() for _ in range(len(self._pieces))]
            if pieces:
                return pieces


class AnswerFailed(Exception):
    """The engine goes on, and the log has what went wrong with this one."""


class Generation:
    """Completions of some prompts; within `async with`, a client that goes away ends them."""

    def __init__(self, engine: "Engine", receive: Receive) -> None:
        self._engine, self._receive = engine, receive
        self._inbox = Inbox()
        self._ids: list[int] = []
        self._num_open = 0

    def submit(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, priority: int = 0, cache_salt: str = ""
    ) -> None:
        """Begins them, or none of them; raises what `Engine.submit` raises."""
        try:
            for number, prompt in enumerate(prompts):
                self._ids += self._engine.submit(
                    prompt,
                    params,
                    sink=self._inbox.put,
                    request_id=REQUEST_ID.get(),
                    priority=priority,
                    cache_salt=cache_salt,
                    first_index=number * params.n,
                )
        except BaseException:
            self._engine.abort(self._ids)
            raise
        self._num_open = len(self._ids)

    async def __aenter__(self) -> "Generation":
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watcher.cancel()
        if self._num_open:
            self._engine.abort(self._ids)

    async def pieces(self) -> AsyncIterator[list[Delta]]:
        """All pieces, those that came together at once.

        Raises:
            ClientGone: nobody reads them any more.
            Unavailable: the engine failed under them.
            AnswerFailed: one of them could not be written down.
        """
        while self._num_open:
            arrived = await self._inbox.take()
            ended = [piece for piece in arrived if piece.finish_reason is not None]
            self._num_open -= len(ended)
            if any(piece.finish_reason == "abort" for piece in ended):
                if self._engine.state == "failed":
                    raise Unavailable("the engine failed; its log has the reason.")
                if self._engine.state == "ready":  # nobody asked for its end
                    raise AnswerFailed("a completion ended before its time")
            yield arrived

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue
        # At once: the reader may be waiting for a slow connection.
        self._engine.abort(self._ids)
        self._inbox.abandon()
