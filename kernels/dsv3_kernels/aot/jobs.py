"""Cases compiled several at a time, by processes that each serve one case after another."""

import concurrent.futures
import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dsv3_kernels.aot import compile, hlo, mlir
from dsv3_kernels.aot.case import AotCase

TIMEOUT = 240.0
"""Seconds one case may take to compile."""
KEPT = (".ptx", ".ptxas", ".sass_ctrl", hlo.FILE, compile.MEMORY)


class Compiled(NamedTuple):
    """What came of a case: its reports by file name, or why there are none."""

    case: AotCase
    dump: dict[str, str]
    error: str | None
    seconds: float


class Server(NamedTuple):
    """A process that compiles, and whether it has not served yet."""

    process: subprocess.Popen[str]
    is_fresh: bool


def compile_all(cases: Sequence[AotCase], jobs: int) -> Iterator[Compiled]:
    """The cases in the order in which they are done, `jobs` at a time."""
    free: queue.SimpleQueue[Server | None] = queue.SimpleQueue()
    for _ in range(jobs):
        free.put(None)
    with concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        try:
            pending = [threads.submit(_compile, each, free) for each in cases]
            for done in concurrent.futures.as_completed(pending):
                yield done.result()
        finally:
            threads.shutdown(cancel_futures=True)
            while not free.empty():
                if server := free.get():
                    server.process.communicate()


def _compile(case: AotCase, free: "queue.SimpleQueue[Server | None]") -> Compiled:
    """One case by a free process; once more by a fresh one if a process that has served others ends on it."""
    start = time.monotonic()
    server = free.get() or _start()
    dump, error = _ask(server, case.name)
    if server.process.poll() is not None and not server.is_fresh:
        server = _start()
        dump, error = _ask(server, case.name)
    free.put(server._replace(is_fresh=False) if server.process.poll() is None else None)
    return Compiled(case, dump, error, time.monotonic() - start)


def _ask(server: Server, name: str) -> tuple[dict[str, str], str | None]:
    """The reports of a case, or none with the error; a process that answers not in time or at all has ended."""
    process = server.process
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.TemporaryDirectory(prefix="aot-") as folder:
        clock = threading.Timer(TIMEOUT, process.kill)
        clock.start()
        start = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # of a process that ended before, which the missing answer shows
            process.stdin.write(json.dumps({"case": name, "folder": folder}) + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        clock.cancel()
        if not answer:
            process.wait()
            if time.monotonic() - start >= TIMEOUT:
                return {}, f"was not compiled within {TIMEOUT:.0f} s"
            log = Path(folder) / compile.LOG
            words = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            return {}, f"does not compile (exit {process.returncode}): {_last_lines(words)}"
        if error := json.loads(answer)["error"]:
            return {}, f"does not compile: {_last_lines(error)}"
        return _read(Path(folder)), None


def _read(folder: Path) -> dict[str, str]:
    """The reports of a case; of MLIR only the module before the first pass, the rest is a hundred times as long."""
    dump = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.name.endswith(KEPT)}
    for path in folder.glob(f"*{mlir.SUFFIX}"):
        with path.open(encoding="utf-8") as lines:
            dump[path.name] = mlir.first_module(lines)
    return dump


def _start() -> Server:
    command = [sys.executable, "-m", "dsv3_kernels.aot.compile"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return Server(process, is_fresh=True)


def _last_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-3:]) or "no message"
