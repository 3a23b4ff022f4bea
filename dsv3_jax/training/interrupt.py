"""Stopping a run from outside: the first signal asks, the second insists."""

import os
import signal
from collections.abc import Callable
from types import FrameType


class StopRequest:
    """Within `with`, SIGTERM and Ctrl-C set `requested` instead of ending the process; a second one ends it at once.

    The loop looks at `requested` after each step, saves and leaves.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.requested = False
        self._say = say
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "StopRequest":
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        self._say(f"{signal.Signals(number).name}: saving after this step, then leaving (again: leave at once).")
