"""Verdicts in a file, a JSON object a line, each there as soon as it is known whatever happens next."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv3_kernels.gpu.checking import PASSED, Verdict

SAME = ("source", "device", "jax", "implementation")
"""What a verdict depends on, besides chance; `commit` is there for the reader."""


@contextmanager
def recorder(path: Path | None, run: Mapping[str, Any]) -> Iterator[Callable[[Verdict], None]]:
    """A function that appends a verdict, with `run`, to the file; without a file it does nothing."""
    if path is None:
        yield lambda verdict: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    is_torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a", encoding="utf-8") as file:
        if is_torn:  # a run was cut short in the middle of a line
            file.write("\n")

        def record(verdict: Verdict) -> None:
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            file.write(json.dumps({**verdict.as_data(), **run, "time": when}) + "\n")
            file.flush()
            os.fsync(file.fileno())

        yield record


def passed_before(path: Path, run: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Op and name of the cases whose last verdict of a run like this one is that they passed."""
    last: dict[tuple[str, str], str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut short
        if isinstance(entry, dict) and all(entry.get(name) == run[name] for name in SAME):
            last[entry["op"], entry["name"]] = entry["verdict"]
    return {case for case, verdict in last.items() if verdict == PASSED}
