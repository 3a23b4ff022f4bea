"""Requests answered by a process of their own, so that a hang or a crash costs one request.

The process is given a request a line, as JSON, on its standard input, and gives an answer a line on its standard
output; the first line, before any request, is what it says of itself. It may serve many requests: it is killed, with
all that it started, and replaced when an answer takes too long, when it ends, and when an answer is its last. It finds
the modules that this process finds.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import IO, Any, NamedTuple

START_LIMIT = 180.0
"""Seconds to import jax and find the device, on a busy machine."""
RESTARTS, PAUSE = 3, 5.0
"""A GPU may need some seconds to be rid of a process that was killed while a kernel ran."""
TELL_EVERY = 10.0
TAIL = 6000
"""Characters of standard error that are reported."""


class Lost(NamedTuple):
    """In place of an answer: the process hung, or it ended."""

    has_hung: bool
    reason: str
    stderr: str


class StartError(RuntimeError):
    """The process did not start; the message holds the end of its standard error."""


class _Process(NamedTuple):
    popen: subprocess.Popen[bytes]
    stderr: IO[bytes]
    buffer: bytearray
    """What was read of an answer that is not whole yet."""


def answers(
    command: Sequence[str],
    requests: Iterable[dict[str, Any]],
    *,
    limit: float,
    is_last: Callable[[dict[str, Any]], bool] = lambda answer: False,
    tell: Callable[[float], None] = lambda seconds: None,
) -> Generator[dict[str, Any] | Lost, None, None]:
    """What the process says of itself, then an answer to each request.

    Args:
        limit: seconds that an answer may take.
        is_last: whether the process is unusable after an answer.
        tell: called every ten seconds of an answer, with the seconds it has taken.
    Raises:
        StartError: the process did not start, or no more after one was lost.
    """
    process, greeting = _started(command)
    try:
        yield greeting
        for request in requests:
            if process is None:
                process = _restarted(command)
            answer = _asked(process, request, limit, tell)
            if isinstance(answer, Lost) or is_last(answer):
                _end(process)
                process = None
            yield answer
    finally:
        if process is not None:
            _end(process)


def standard_output() -> Callable[[dict[str, Any]], None]:
    """For the process: what writes an answer; what anybody else prints goes to standard error from now on."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(answer: dict[str, Any]) -> None:
        pipe.write(json.dumps(answer) + "\n")
        pipe.flush()

    return tell


def _restarted(command: Sequence[str]) -> _Process:
    for attempt in range(RESTARTS):
        try:
            return _started(command)[0]
        except StartError:
            if attempt == RESTARTS - 1:
                raise
            time.sleep(PAUSE)
    raise AssertionError("unreachable")


def _started(command: Sequence[str]) -> tuple[_Process, dict[str, Any]]:
    stderr = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process, by `_end`
    found_here = os.pathsep.join(path or os.getcwd() for path in sys.path)
    popen = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONPATH": found_here},
        start_new_session=True,  # a group of its own, to be killed as a whole
    )
    process = _Process(popen, stderr, bytearray())
    try:
        return process, _answer(process, START_LIMIT, lambda seconds: None)
    except (TimeoutError, EOFError) as error:
        said = _lost(process, 0, error)
        _end(process)
        raise StartError(f"{' '.join(command[:3])} did not start: {said.reason}\n{said.stderr}") from error


def _asked(
    process: _Process, request: dict[str, Any], limit: float, tell: Callable[[float], None]
) -> dict[str, Any] | Lost:
    written = os.fstat(process.stderr.fileno()).st_size
    assert process.popen.stdin is not None
    try:
        process.popen.stdin.write(json.dumps(request).encode() + b"\n")
        process.popen.stdin.flush()
        return _answer(process, limit, tell)
    except (TimeoutError, EOFError, BrokenPipeError) as error:
        return _lost(process, written, error)


def _answer(process: _Process, limit: float, tell: Callable[[float], None]) -> dict[str, Any]:
    """The next line. Raises TimeoutError after `limit` seconds, EOFError if the process has ended."""
    assert process.popen.stdout is not None
    started = time.monotonic()
    while b"\n" not in process.buffer:
        passed = time.monotonic() - started
        if passed >= limit:
            raise TimeoutError(f"no answer in {limit:g} s")
        ready, _, _ = select.select([process.popen.stdout], [], [], min(TELL_EVERY, limit - passed))
        if ready:
            read = os.read(process.popen.stdout.fileno(), 1 << 16)
            if not read:
                raise EOFError
            process.buffer.extend(read)
        elif limit - passed > TELL_EVERY:
            tell(time.monotonic() - started)
    line, _, rest = bytes(process.buffer).partition(b"\n")
    process.buffer[:] = rest
    return json.loads(line)


def _lost(process: _Process, written: int, error: Exception) -> Lost:
    """Why there is no answer; a process that still runs is made to write where it is, then killed."""
    has_hung = isinstance(error, TimeoutError)
    if has_hung:
        process.popen.send_signal(signal.SIGABRT)  # Python's fault handler writes the stacks of all threads
    _wait(process, 5.0)
    _kill(process)
    process.stderr.seek(written)
    stderr = process.stderr.read().decode(errors="replace").strip()[-TAIL:]
    if has_hung:
        return Lost(True, str(error), stderr)
    code = process.popen.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return Lost(False, f"its process {how}", stderr)


def _wait(process: _Process, seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.popen.wait(seconds)


def _kill(process: _Process) -> None:
    """Kills the process and what it started; one that the driver does not let go is left behind."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.popen.pid, signal.SIGKILL)
    _wait(process, 30.0)


def _end(process: _Process) -> None:
    _kill(process)
    for pipe in (process.popen.stdin, process.popen.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # a request that was not read
                pipe.close()
