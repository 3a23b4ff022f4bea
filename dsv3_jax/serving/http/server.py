"""The process that serves: it listens, answers, and ends when it is told to."""

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.paths import user_path
from dsv3_jax.interrupt import StopRequest
from dsv3_jax.serving.http.connection import Connection

if TYPE_CHECKING:
    from dsv3_jax.serving.engine import Engine

LOG = logging.getLogger(__name__)

KEY_VARIABLE = "DSV3_API_KEY"
_FLUSH_SECONDS = 2
"""Time that answers get to reach their clients when the engine has ended them."""
_CLOSE_SECONDS = 10.0
"""Time that the engine's threads get to end; one that compiles cannot be interrupted."""


def api_key_of(file: str | None) -> str | None:
    """The key in a file, else in DSV3_API_KEY, else None.

    Raises: `UserError` for a file that cannot be read, or a key that no header can hold.
    """
    if file is not None:
        path, where = user_path(file), f"--api-key-file {file}"
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: cannot be read ({error}); give a file that holds the key.") from error
    elif KEY_VARIABLE in os.environ:
        key, where = os.environ[KEY_VARIABLE].strip(), KEY_VARIABLE
    else:
        return None
    is_fit = key.isascii() and key.isprintable() and " " not in key and key != ""
    check(is_fit, f"{where}: a key must be one word of printable ASCII; write one.")
    return key


def bind(host: str, port: int, *, has_key: bool) -> socket.socket:
    """A socket that is bound, not yet listening.

    Raises: `UserError` for an address that others can reach without a key, or that cannot be had.
    """
    check(0 <= port <= 65535, f"--port {port} must lie in 0..65535.")
    check(
        has_key or _is_loopback(host),
        f"--host {host} lets others reach this server, so it needs a key: give --api-key-file or set {KEY_VARIABLE}.",
    )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host} is no address of this machine ({error}); try 127.0.0.1.") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port is free as soon as its server has ended
        found.bind(address)
    except OSError as error:
        found.close()
        raise UserError(f"port {port} of {host} cannot be had ({error.strerror}); choose another --port.") from error
    return found


def serve(app: FastAPI, engine: "Engine", sock: socket.socket) -> int:
    """Answers until SIGTERM, Ctrl-C or SIGHUP; then lets running requests end, and returns 0. Main thread only.

    They get `ServingConfig.drain_seconds`. A second signal ends the process at once. Returns 1 where the engine's pages
    do not add up in the end.
    """
    server, seconds = Server(app, sock), engine.serving.drain_seconds
    sound: list[bool] = []
    closing = threading.Thread(target=engine.close, daemon=True, name="close")

    def drain(number: signal.Signals) -> None:
        LOG.info("%s: no new requests; running ones get %g seconds (again: end at once)", number.name, seconds)
        has_run = engine.state == "ready"  # else its thread compiles, and answers no question
        if not engine.drain(seconds):
            LOG.warning("the time to drain is over; what still runs is aborted")
        if has_run:
            sound.append(_is_sound(engine))
        closing.start()
        server.should_exit = True

    with StopRequest(answer=drain):
        server.run()
        closing.join(_CLOSE_SECONDS)
    return 0 if all(sound) else 1


def _is_sound(engine: "Engine") -> bool:
    """Whether the engine's pages add up; the log has why not."""
    try:
        engine.check()
    except Exception:
        LOG.exception("the engine's pages do not add up")
        return False
    return True


class Server(uvicorn.Server):
    """uvicorn on a socket that is bound, without signal handlers of its own."""

    def __init__(self, app: FastAPI, sock: socket.socket) -> None:
        self._sock, serving = sock, app.state.served.engine.serving
        self._engine, self._is_ready, self._is_stalled = app.state.served.engine, False, False
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                # Twice what the guard lets through, so that it can answer 431 itself.
                h11_max_incomplete_event_size=2 * serving.max_header_bytes,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=_FLUSH_SECONDS,
                callback_notify=self._watch,
                timeout_notify=1,
            )
        )

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._sock.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until `should_exit` is set."""
        asyncio.run(self.serve(sockets=[self._sock]))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, and tells where."""
        await super().startup(sockets)
        LOG.info("%s listens at %s", self.config.app.state.served.model_name, self.url)  # pyright: ignore

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the caller."""
        yield

    async def _watch(self) -> None:
        """Tells when the engine is ready, and its state when its steps stop advancing."""
        if self._engine.state == "ready" and not self._is_ready:
            self._is_ready = True
            LOG.info("ready")
        was_stalled, self._is_stalled = self._is_stalled, self._engine.is_stalled
        if self._is_stalled and not was_stalled:
            seconds = self._engine.serving.stall_seconds
            LOG.error("no step has ended for %g seconds while work waits: %s", seconds, self._engine.describe())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
