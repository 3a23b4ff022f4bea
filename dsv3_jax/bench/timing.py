"""Wall-clock times of programs that take turns, so that a machine's drift hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def take_turns(programs: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of each program in each round; a program runs once and returns how long its work took."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            seconds[name].append(program())
    return seconds


def timed(work: Callable[[], Any]) -> float:
    """Seconds until every array that `work` returns is ready."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


class Stopwatch:
    """Seconds from one lap to the next."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since the watch was made."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, fastest and slowest."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Median over rounds of one program's seconds by another's: both saw the same disturbances."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
