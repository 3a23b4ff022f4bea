"""What every request passes before its route: id, headers, key, type and size of the body."""

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable

from fastapi.responses import Response

from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.serving.http.asgi import App, Message, Receive, Scope, Send
from dsv3_jax.serving.http.errors import error_response, response_to
from dsv3_jax.serving.http.logs import REQUEST_ID

LOG = logging.getLogger(__name__)

OPEN = ("/health", "/ready")
"""Routes that need no key."""

BODY_SECONDS = 60.0
"""Time that a client gets to send a body."""

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")


class ClientGone(Exception):
    """The client closed the connection before it had an answer."""


class Guard:
    """ASGI middleware around the routes; what is raised inside becomes an answer here.

    The whole body is read before the route runs, so that nothing of a request that is too large is parsed. Behind it
    `receive` waits for the client to go away.
    """

    def __init__(self, app: App, *, serving: ServingConfig, api_key: str | None) -> None:
        self._app, self._serving = app, serving
        self._key = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin, given = time.monotonic(), _header(scope, b"x-request-id")
        request_id = given.decode() if given and _REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        token = REQUEST_ID.set(request_id)
        answer = _Answer(send, request_id)
        try:
            await self._respond(scope, receive, answer.send)
        except ClientGone:
            answer.status = answer.status or 499
        except Exception as error:  # noqa: BLE001 - a failing request fails alone
            await _respond_with(response_to(error), scope, receive, answer)
        finally:
            milliseconds = 1e3 * (time.monotonic() - begin)
            where = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200]
            level = logging.DEBUG if scope["path"] in OPEN else logging.INFO  # which are asked all the time
            LOG.log(level, "%s %s %s %.1f ms", scope["method"], where, answer.status or 499, milliseconds)
            REQUEST_ID.reset(token)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refused(scope)
        body = b""
        if refused is None and scope["method"] == "POST":
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    body = await _read(receive, self._serving.max_body_bytes)
            except TimeoutError:
                refused = error_response(408, f"The body did not come within {BODY_SECONDS:.0f} seconds.")
            if body is None:
                refused = self._too_large()
        if refused is not None:
            await refused(scope, receive, send)
        else:
            await self._app(scope, _replayed(body or b"", receive), send)

    def _refused(self, scope: Scope) -> Response | None:
        """The answer to a request that needs no look at its body."""
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = sum(len(name) + len(value) + 4 for name, value in headers)
        if len(headers) > self._serving.max_headers or size > self._serving.max_header_bytes:
            return error_response(
                431,
                f"The request has {len(headers)} headers of {size} bytes; at most {self._serving.max_headers} "
                f"of {self._serving.max_header_bytes} are allowed.",
            )
        if self._key is not None and scope["path"] not in OPEN and not self._has_key(scope):
            return error_response(
                401,
                "The API key is missing or wrong; send it as `Authorization: Bearer KEY`.",
                headers={"www-authenticate": 'Basic realm="dsv3-jax"' if scope["path"] == "/" else "Bearer"},
            )
        if scope["method"] != "POST":
            return None
        length = _header(scope, b"content-length")
        if length and int(length) > self._serving.max_body_bytes:
            return self._too_large()
        return None

    def _has_key(self, scope: Scope) -> bool:
        """As a bearer's token, or as the password that a browser asks for before it shows the page."""
        kind, _, given = (_header(scope, b"authorization") or b"").partition(b" ")
        is_basic = kind.lower() == b"basic"
        key = _password(given) if is_basic else given.strip()
        # Digests have one length, so the time tells nothing of the key's.
        is_right = hmac.compare_digest(_digest(key), self._key or b"")
        return is_right and (is_basic or kind.lower() == b"bearer")

    def _too_large(self) -> Response:
        return error_response(413, f"The body exceeds {self._serving.max_body_bytes} bytes; send a shorter one.")


class _Answer:
    """Sends a response, with the request's id among its headers."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id.encode()
        self.status: int | None = None

    async def send(self, message: Message) -> None:
        """Passes a piece on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", self._request_id)]}
        await self._send(message)


async def _respond_with(response: Response, scope: Scope, receive: Receive, answer: _Answer) -> None:
    """Answers with an error, where nothing was answered yet."""
    if answer.status is None:
        await response(scope, receive, answer.send)


async def _read(receive: Receive, most: int) -> bytes | None:
    """The body; None where it has more than `most` bytes."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > most:
            return None
        if not message.get("more_body", False):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """A `receive` that gives the body that was read, then what comes."""
    is_given = False

    async def again() -> Message:
        nonlocal is_given
        if not is_given:
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}
        while True:  # a body that a route without one was sent
            message = await receive()
            if message["type"] == "http.disconnect":
                return message

    return again


def _header(scope: Scope, name: bytes) -> bytes | None:
    """The first value of a header."""
    return next((value for one, value in scope["headers"] if one == name), None)


def _password(given: bytes) -> bytes:
    """The password of basic credentials, whoever the user is."""
    try:
        return base64.b64decode(given, validate=True).partition(b":")[2]
    except ValueError:
        return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
