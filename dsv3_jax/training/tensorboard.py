"""Scalars of a run as TensorBoard reads them: a file of events, written by the caller's own thread."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import RecordWriter

# These classes are made when their module is imported, which a type checker does not see.
Event: Any = vars(event_pb2)["Event"]
SessionLog: Any = vars(event_pb2)["SessionLog"]
Summary: Any = vars(summary_pb2)["Summary"]

FLUSH_EVERY_S = 20.0


class EventFile:
    """Appends events to a new file in `folder`. The first failure is passed to `warn` and ends the writing, no more.

    A library's writer thread would do this in the background, and block the run for ever once that thread has died.
    """

    def __init__(self, folder: Path, *, step: int, warn: Callable[[str], None]) -> None:
        self.failure = ""
        """Why events are missing; empty: none is."""
        self._folder, self._warn = folder, warn
        self._file: RecordWriter | None = None
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{socket.gethostname()}.{os.getpid()}"
        with self._guarded():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(str(folder.absolute() / name))
            self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
            # TensorBoard drops what earlier files hold of later steps: a resumed run writes them again.
            start = SessionLog(status=SessionLog.START)
            self._append(Event(wall_time=time.time(), step=step + 1, session_log=start))
        self._flushed = time.monotonic()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One value of each tag; a tag gets at most one value a step."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        with self._guarded():
            self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
            if self._file is not None and time.monotonic() - self._flushed > FLUSH_EVERY_S:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Has everything on the disk."""
        with self._guarded():
            if self._file is not None:
                self._file.close()

    def _append(self, event: Any) -> None:
        if self._file is not None:
            self._file.write(event.SerializeToString())

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
                self._file = None
            self.failure = f"TensorBoard's events cannot be written to {self._folder}: {error}"
            self._warn(f"{self.failure}; the run goes on without them.")
