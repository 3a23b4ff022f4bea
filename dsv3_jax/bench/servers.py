"""Server processes: started on a free port, waited for, ended."""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

from dsv3_jax.config.check import UserError, check
from dsv3_jax.output import dependable_output

_SERVE = Path(__file__).parents[2] / "serve.py"


@dataclasses.dataclass(frozen=True)
class Running:
    """A server that answers."""

    process: subprocess.Popen[bytes]
    port: int
    seconds_to_ready: float
    log: IO[bytes]

    @property
    def url(self) -> str:
        """Of its OpenAI routes."""
        return f"http://127.0.0.1:{self.port}/v1"

    def log_text(self) -> str:
        """What it has printed."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")


@contextlib.contextmanager
def our_server(
    model: Path, *arguments: str, port: int | None = None, cache: Path | None = None, seconds: float = 600.0
) -> Iterator[Running]:
    """A process of serve.py on a folder, ready for requests; ended as `server` ends it.

    Args:
        arguments: further ones of its command line.
        port: default: a free one.
        cache: of compiled programs; default: what the environment says.
    """
    check(_SERVE.is_file(), f"{_SERVE} is missing; run this from a checkout of the project.")
    port = port or free_port()
    command = [sys.executable, str(_SERVE), "--model", str(model), "--port", str(port), *arguments]
    extra = {} if cache is None else {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    with server(command, port=port, ready="/ready", extra=extra, seconds=seconds) as running:
        yield running


@contextlib.contextmanager
def server(
    command: Sequence[str], *, port: int, ready: str, extra: Mapping[str, str] | None = None, seconds: float = 600.0
) -> Iterator[Running]:
    """A process that listens on `port`, from the moment at which GET `ready` answers 200.

    At the end it gets SIGTERM, and is killed where half a minute later it still runs.

    Raises:
        UserError: it cannot be started, ends, or is not ready within `seconds`.
    """
    with tempfile.TemporaryFile() as log:
        start = time.monotonic()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **(extra or {})}
            )
        except OSError as error:
            raise UserError(f"{command[0]} cannot be started ({error.strerror}); give a program.") from error
        try:
            while not answers(f"http://127.0.0.1:{port}{ready}"):
                if process.poll() is not None or time.monotonic() - start > seconds:
                    log.seek(0)
                    tail = log.read().decode(errors="replace")[-2000:]
                    what = f"not ready after {seconds:.0f} s" if process.poll() is None else "ended"
                    raise UserError(f"{' '.join(command)}: {what}; it printed:\n{tail}")
                time.sleep(0.05)
            yield Running(process, port, time.monotonic() - start, log)
        finally:
            end(process)


def run_with_servers(main: Callable[[], int]) -> NoReturn:
    """Runs a command line that starts servers: SIGTERM unwinds it as Ctrl-C does, so that they end before it."""

    def unwind(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, unwind)
    dependable_output()
    sys.exit(main())


def answers(url: str) -> bool:
    """Whether GET `url` answers 200 within two seconds."""
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return response.status == 200
    except (OSError, ValueError, urllib.error.URLError):
        return False


def end(process: subprocess.Popen[bytes], *, seconds: float = 30.0) -> int:
    """Asks a process to end, insists after `seconds`, and returns its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
