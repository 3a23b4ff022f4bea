"""HTTP/1.1 of asyncio alone: one connection a request, answers read as they come."""

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit


class Response(NamedTuple):
    """Status, headers in lower case, and the body's pieces as they come."""

    status: int
    headers: dict[str, str]
    body: AsyncIterator[bytes]

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self.body])


class Server(NamedTuple):
    """Where requests go."""

    host: str
    port: int
    path: str = ""
    """In front of every route, such as /v1."""
    is_encrypted: bool = False

    @classmethod
    def at(cls, url: str) -> "Server":
        """The server of a URL, http or https."""
        parts = urlsplit(url)
        is_encrypted = parts.scheme == "https"
        port = parts.port or (443 if is_encrypted else 80)
        return cls(parts.hostname or "", port, parts.path.rstrip("/"), is_encrypted)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A new connection."""
        context = ssl.create_default_context() if self.is_encrypted else None
        return await asyncio.open_connection(self.host, self.port, ssl=context)


@contextlib.asynccontextmanager
async def send(
    server: Server,
    method: str,
    route: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[Response]:
    """Sends `body` (bytes as they are, anything else as JSON) and gives the answer; leaving it early disconnects.

    Raises:
        OSError: no connection.
        ValueError: the answer is no HTTP.
        asyncio.IncompleteReadError: the server ended in the middle of it.
    """
    reader, writer = await server.connect()
    try:
        writer.write(request_bytes(server, method, route, body, headers))
        with contextlib.suppress(ConnectionError):  # a server may refuse a body before it has all of it
            await writer.drain()
        yield await read_response(reader)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def request_bytes(
    server: Server, method: str, route: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """A request as it goes over the line."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {server.path}{route} HTTP/1.1", f"Host: {server.host}:{server.port}", "Connection: close"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


async def read_response(reader: asyncio.StreamReader) -> Response:
    """The answer's head; its body is read by whoever iterates over it."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    version, _, rest = head[0].partition(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(f"{head[0][:80]!r} is no answer of an HTTP server.")
    pairs = (line.partition(":") for line in head[1:] if line)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    return Response(int(rest[:3]), headers, _body(reader, headers))


async def events(body: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to [DONE]."""
    waiting = b""
    async for piece in body:
        *lines, waiting = (waiting + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        return
    if "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while piece := await reader.read(1 << 16):
        yield piece
