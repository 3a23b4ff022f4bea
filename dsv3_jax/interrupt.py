"""Stopping a program from outside: the first signal asks, the second insists.

Python runs signal handlers in the main thread between two of its own instructions, so a handler waits for native code
(learning a tokenizer, compiling, evaluating). Here the signal's number goes through a pipe to a thread that acts on it
at once, and a long call runs in a thread of its own, which the main thread can give up.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import NoReturn, ParamSpec, Protocol, TypeVar, runtime_checkable

from dsv3_jax.output import dependable_output

P = ParamSpec("P")
R = TypeVar("R")


class Stopped(BaseException):
    """The user asked the program to stop. Not an error, so `except Exception` lets it pass."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number
        """What the shell expects of a program that a signal ended."""


@runtime_checkable
class Stop(Protocol):
    """What long work asks whether it should end."""

    def check(self) -> None:
        """Raises `Stopped` if it should."""
        ...

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of `function`; raises `Stopped` if the work should end, before or instead."""
        ...


class StopRequest:
    """Within `with`, SIGTERM, Ctrl-C and SIGHUP set `requested` instead of ending the process.

    A second SIGTERM or Ctrl-C ends the process at once. A second SIGHUP does not: closing a terminal sends two. Under
    `nohup`, which has SIGHUP ignored, it stays ignored. For the main thread only.

    Args:
        answer: called with the first signal, in a thread of its own.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self, answer: Callable[[signal.Signals], None] | None = None) -> None:
        self._answer = answer or _announce
        self._number = 0
        self._changed = threading.Condition()
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self._given_up: threading.Thread | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._number != 0

    @property
    def number(self) -> int:
        """The signal that has come; 0: none."""
        return self._number

    def check(self) -> None:
        """Raises `Stopped` if a signal has come."""
        if self._number:
            raise Stopped(self._number)

    def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of `function`, called in another thread; raises `Stopped` as soon as a signal comes.

        Then the call may go on in its thread, so it must not change what the program saves afterwards, and the
        program should end by `leave`.
        """
        self.check()
        future: Future[R] = Future()

        def call() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - whatever it is, `result` raises it in the caller's thread
                future.set_exception(error)
            with self._changed:
                self._changed.notify_all()

        thread = threading.Thread(target=call, daemon=True, name="call")
        thread.start()
        with self._changed:
            self._changed.wait_for(lambda: future.done() or self.requested)
        if not future.done():
            self._given_up = thread
            self.check()
        return future.result()

    def __enter__(self) -> "StopRequest":
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, daemon=True, name="signals")
        self._listener.start()
        for number in self.SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, _pass)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_end)
        self._listener.join()
        os.close(self._read_end)
        if self._given_up is not None:
            # Most calls end by themselves soon, at their own `check`; an interpreter that ends under one may crash.
            self._given_up.join(timeout=1.0)

    def _listen(self) -> None:
        while arrived := os.read(self._read_end, 1):
            number = arrived[0]
            if number not in self.SIGNALS or (self.requested and number == signal.SIGHUP):
                continue
            if self.requested:
                os._exit(128 + number)
            with self._changed:
                self._number = number
                self._changed.notify_all()
            # In a thread of its own: a pipe that nobody reads from must not make the next signal wait.
            threading.Thread(target=self._answer, args=(signal.Signals(number),), daemon=True).start()


def leave(code: int) -> NoReturn:
    """Ends the process with exit code `code` and all that was printed, without waiting for calls given up."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            if stream.isatty():
                stream.write(_SHOW_CURSOR)
            stream.flush()
    os._exit(code)


def run_program(main: Callable[[], int]) -> NoReturn:
    """Runs a command line that has nothing to save: a signal ends it at once, in native code too (128 + signal)."""
    dependable_output()
    with StopRequest(answer=_leave_at_once):
        code = main()
    sys.exit(code)


def _announce(number: signal.Signals) -> None:
    print(f"{number.name}: leaving as soon as everything is saved (again: leave at once).")


def _leave_at_once(number: signal.Signals) -> None:
    stopped = Stopped(number)
    print(stopped, file=sys.stderr)
    leave(stopped.exit_code)


def _pass(number: int, frame: FrameType | None) -> None:
    """Handles a signal that the pipe has already reported."""


_SHOW_CURSOR = "\x1b[?25h"
"""A progress bar that is cut short leaves the terminal's cursor hidden."""
