"""Waiting times of our server: behind a cached prefix, beside a long prompt, and at its start."""

import asyncio
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dsv3_jax.bench.goals import Line, at_most
from dsv3_jax.bench.latency import Answer
from dsv3_jax.bench.load_client import Target, ask, find
from dsv3_jax.bench.servers import our_server
from dsv3_jax.bench.workload import Request

_PREFIX, _TAIL = 512, 16
_LONG, _CHUNK, _NEIGHBOURS = 1024, 128, 7
_COLD_GOAL_S, _CACHED_GOAL_S = 90.0, 20.0


def measure(folder: Path, *, vocab_size: int, rounds: int, advance: Callable[[int], None]) -> list[Line]:
    """The lines on waiting times, best of `rounds`; advances by `NUM_PARTS`."""
    lines = cold_starts(folder, advance)
    rng = np.random.default_rng(1)

    def prompt(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocab_size, count).tolist())

    with our_server(folder) as running:
        target, _ = asyncio.run(find(running.url, model=None, key=None, is_plain=False))
        asyncio.run(ask(target, Request(prompt(_LONG), 2)))
        lines.append(asyncio.run(_prefix(target, prompt, rounds)))
        advance(1)
        lines.append(asyncio.run(_gaps(target, prompt, rounds)))
        advance(1)
    return lines


NUM_PARTS = 4
"""Of `measure`."""


def cold_starts(folder: Path, advance: Callable[[int], None]) -> list[Line]:
    """Seconds from starting the process to /ready, first with an empty compile cache and then with what it left."""
    lines = []
    with tempfile.TemporaryDirectory() as cache:
        for what, goal in (("an empty compile cache", _COLD_GOAL_S), ("the compile cache", _CACHED_GOAL_S)):
            with our_server(folder, cache=Path(cache)) as running:
                lines.append(at_most(f"start to /ready with {what}", running.seconds_to_ready, goal, "s"))
            advance(1)
    return lines


async def _prefix(target: Target, prompt: Callable[[int], tuple[int, ...]], rounds: int) -> Line:
    """The first token behind a prefix that the server has just read, over that of a prompt as long and unknown."""
    cold, cached = [], []
    for _ in range(rounds):
        prefix = prompt(_PREFIX)
        cold.append((await ask(target, Request(prefix + prompt(_TAIL), 1))).ttft)
        cached.append((await ask(target, Request(prefix + prompt(_TAIL), 1))).ttft)
    what = f"first token of {_PREFIX} cached + {_TAIL} tokens over cold ({1e3 * min(cold):.0f} ms)"
    return at_most(what, min(cached) / min(cold), 0.15, "times")


async def _gaps(target: Target, prompt: Callable[[int], tuple[int, ...]], rounds: int) -> Line:
    """The longest gap of decoding clients while a long prompt is read, beside one decoding step and one chunk.

    A step is the median gap before it came. The chunk is the dearest, the last: what the prompt's first token takes
    alone, less that of a prompt shorter by one chunk.
    """
    longest, allowed = [], []
    for _ in range(rounds):
        alone = [(await ask(target, Request(prompt(_LONG - less), 1))).ttft for less in (0, _CHUNK)]
        clients = [asyncio.create_task(ask(target, Request(prompt(_TAIL), 300))) for _ in range(_NEIGHBOURS)]
        await asyncio.sleep(4 * alone[0])
        long = await ask(target, Request(prompt(_LONG), 1))
        before, during = gaps_around(await asyncio.gather(*clients), long)
        longest.append(max(during))
        allowed.append(statistics.median(before) + alone[0] - alone[1])
    best = int(np.argmin([gap - limit for gap, limit in zip(longest, allowed, strict=True)]))
    what = f"longest gap of {_NEIGHBOURS} clients beside a prompt of {_LONG} (goal: a decoding step + a chunk)"
    return at_most(what, 1e3 * longest[best], 1e3 * allowed[best], "ms")


def gaps_around(answers: list[Answer], long: Answer) -> tuple[list[float], list[float]]:
    """Gaps of `answers` that ended before `long` was sent, and those that overlap the time until its first token."""
    before, during = [], []
    first = long.sent + long.ttft
    for answer in answers:
        for start, end in zip(answer.arrivals, answer.arrivals[1:], strict=False):
            if end < long.sent:
                before.append(end - start)
            elif start < first:
                during.append(end - start)
    return before, during
