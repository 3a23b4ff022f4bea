"""Waits for a process as long as it advances, however slow or busy the machine is."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO


class StuckError(AssertionError):
    """A process stopped advancing and was ended; the message holds its output and the stacks of its threads."""


def run_watched(
    command: Sequence[str], *, env: Mapping[str, str], patience: float = 60.0, least_cpu: float = 1.0
) -> subprocess.CompletedProcess[str]:
    """The finished process, with its output.

    It is stuck when in `patience` seconds it neither wrote anything nor used `least_cpu` seconds of a core: waiting
    threads that look up now and then use a hundredth.

    Raises:
        StuckError: it is stuck; Python's fault handler has written where.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, env={**env, "PYTHONFAULTHANDLER": "1"}, stdout=out, stderr=err, text=True)
        try:
            _wait_while_it_advances(process, (out, err), patience=patience, least_cpu=least_cpu)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return subprocess.CompletedProcess(command, process.returncode, _read(out), _read(err))


def cpu_seconds(pid: int) -> float:
    """Seconds of all cores that a process has used, from /proc, or ps where there is none."""
    path = Path(f"/proc/{pid}/stat")
    if path.exists():
        fields = path.read_text().rpartition(")")[2].split()  # the name before may hold spaces
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    shown = subprocess.run(["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return sum(float(part) * 60**i for i, part in enumerate(reversed(shown.strip().split(":"))) if part)


def _wait_while_it_advances(
    process: subprocess.Popen[str], streams: Sequence[IO[str]], *, patience: float, least_cpu: float
) -> None:
    seen, since = (-1, 0.0), time.monotonic()
    while process.poll() is None:
        written, cpu = sum(os.fstat(stream.fileno()).st_size for stream in streams), cpu_seconds(process.pid)
        if written != seen[0] or cpu >= seen[1] + least_cpu:
            seen, since = (written, cpu), time.monotonic()
        elif time.monotonic() - since > patience:
            process.send_signal(signal.SIGABRT)  # the fault handler writes every thread's stack
            process.wait()
            raise StuckError(
                f"no output and less than {least_cpu} s of computing in {patience:.0f} s:\n"
                + "\n".join(_read(stream)[-5000:] for stream in streams)
            )
        time.sleep(min(0.2, patience / 10))


def _read(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()
