"""A server among hostile clients: every answer is right or a refusal, nothing leaks, and it ends when it is told to.

    python -m dsv3_jax.bench.hostile --minutes 10 --clients 64
    python -m dsv3_jax.bench.hostile --url http://127.0.0.1:8000/v1

Clients ask for answers that are known, leave in the middle, read slowly or not at all, and send what is too long, too
large, malformed or no HTTP. Without `--url` the server is a process of its own with a small model: its memory is
watched, then it is told to end while it answers, killed, and started again on the same port. Exits with 1 where a
goal is not met.
"""

import argparse
import asyncio
import collections
import dataclasses
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rich.console

from dsv3_jax.bench import goals
from dsv3_jax.bench.goals import Line, at_least, at_most
from dsv3_jax.bench.hostile_acts import Known, Stage, Tally, act, ask_alone
from dsv3_jax.bench.hostile_ending import killed_and_restarted, told_to_end
from dsv3_jax.bench.hostile_server import (
    SMALL,
    busy,
    export_small,
    greedy,
    growth,
    health,
    known_prompts,
    resident_memory,
    sampled,
)
from dsv3_jax.bench.load_client import find
from dsv3_jax.bench.servers import our_server, run_with_servers
from dsv3_jax.config.check import UserError, check
from dsv3_jax.progress import progress

EXIT_UNMET, EXIT_USER_ERROR = 1, 2
_QUIET_EVERY_S, _QUIET_WITHIN_S = 20.0, 1.0
"""How often all clients pause, and after how long nothing of theirs is left in the engine."""
_LEFT_FOR_EVER_S = 10.0
_SETTLED_S = 120.0
"""Memory may grow so long."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, 1 for a goal that is not met, or 2 for a user's error)."""
    given = _parse(arguments)
    try:
        check(given.minutes > 0, f"--minutes {given.minutes} must be above 0.")
        check(given.clients > 0, f"--clients {given.clients} must be at least 1.")
        stage, lines = _foreign(given) if given.url else _own(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    tally = stage.tally
    lines.insert(
        0, Line("wrong answers, answers of 500 and above, none", len(tally.faults), "", "= 0", not tally.faults)
    )
    if given.json:
        shown = {"acts": tally.acts, "statuses": tally.statuses, "faults": tally.faults}
        print(json.dumps({"lines": [line.as_dict() for line in lines], **shown}))
    else:
        console = rich.console.Console()
        console.print(goals.table(f"{given.clients} hostile clients, {given.minutes:g} minutes", lines))
        console.print(f"acts: {dict(tally.acts.most_common())}\nstatuses: {dict(sorted(tally.statuses.items()))}")
        for kind, number in collections.Counter(map(_kind, tally.faults)).most_common():
            example = next(fault for fault in tally.faults if _kind(fault) == kind)
            console.print(f"{number} faults such as: {example}", markup=False)
    return EXIT_UNMET if any(line.is_met is False for line in lines) else 0


def _kind(fault: str) -> str:
    return fault.partition(":")[0]


def _own(given: argparse.Namespace) -> tuple[Stage, list[Line]]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        known = export_small(folder)
        with our_server(folder) as running:
            stage = asyncio.run(_stage(running.url, known, key=None))
            with resident_memory(running.process.pid) as seen:
                lines = _load(given, stage, running.url)
            if seen:
                settled = min(_SETTLED_S / (60 * given.minutes), 0.5)
                lines.append(at_most("growth of resident memory", 100 * growth(seen, settled=settled), 5.0, "%"))
            lines += asyncio.run(told_to_end(running, stage))
        lines += killed_and_restarted(folder, running.port, stage)
    return stage, lines


def _foreign(given: argparse.Namespace) -> tuple[Stage, list[Line]]:
    stage = asyncio.run(_stage(given.url, [], key=given.key, vocab_size=given.vocab_size))
    return stage, _load(given, stage, given.url)


async def _stage(url: str, known: list[Known], *, key: str | None, vocab_size: int = SMALL.vocab_size) -> Stage:
    """What acts need: the answers that are known, and those that the server gives to others while it is alone."""
    target, longest = await find(url, model=None, key=key, is_plain=False)
    stage = Stage(target, known, longest or SMALL.max_position, Tally())
    prompts = known_prompts(np.random.default_rng(0), vocab_size)
    unknown = sampled(prompts) + ([] if known else greedy(prompts))
    found = [dataclasses.replace(one, tokens=await ask_alone(stage, one)) for one in unknown]
    return dataclasses.replace(stage, known=[*known, *found])


def _load(given: argparse.Namespace, stage: Stage, url: str) -> list[Line]:
    """Hostile clients for the time given, and what they saw."""
    server = stage.target.server
    with health(server.host, server.port) as probed:
        quiet = asyncio.run(_clients(given, stage, url))
    tally = stage.tally
    lines = [
        Line("acts", sum(tally.acts.values()), ""),
        at_least("answers compared with known ones", tally.compared, 1, ""),
        at_most("99th percentile of /health", float(np.percentile(probed["milliseconds"], 99)), 100.0, "ms"),
        Line("/health without an answer", probed["failed"], "", "= 0", probed["failed"] == 0),
    ]
    for limit in (_QUIET_WITHIN_S, _LEFT_FOR_EVER_S) if quiet else ():
        late = sum(seconds > limit for seconds in quiet)
        what = f"of {len(quiet)} pauses, those in which requests or pages were left after {limit:g} s"
        lines.append(Line(what, late, "", "= 0", late == 0))
    return lines


async def _clients(given: argparse.Namespace, stage: Stage, url: str) -> list[float]:
    """All clients until the time is over; for each of their pauses, the seconds until nothing was left of them."""
    end, gate, working = time.monotonic() + 60 * given.minutes, asyncio.Event(), set[int]()
    gate.set()

    async def client(number: int) -> None:
        rng = random.Random(given.seed * 1000 + number)
        while time.monotonic() < end:
            await gate.wait()
            working.add(number)
            await act(stage, rng)
            working.discard(number)
            await asyncio.sleep(rng.expovariate(1 / given.pause))

    clients = [asyncio.create_task(client(number)) for number in range(given.clients)]
    quiet, total = [], int(60 * given.minutes)
    with progress("hostile clients", total) as advance:
        for second in range(1, total + 1):
            await asyncio.sleep(max(0.0, end - total + second - time.monotonic()))
            advance(1)
            if second % _QUIET_EVERY_S == 0 or second == total:
                gate.clear()
                quiet += await _quiet(working, url)
                gate.set()
        await asyncio.gather(*clients)
    return quiet


async def _quiet(working: set[int], url: str) -> list[float]:
    """Seconds from the end of every act until the engine holds nothing; empty where /metrics does not say."""
    while working:
        await asyncio.sleep(0.02)
    start = time.monotonic()
    while (held := await asyncio.to_thread(busy, url)) is not None:
        seconds = time.monotonic() - start
        if held == (0.0, 0.0) or seconds > _LEFT_FOR_EVER_S:
            return [seconds]
        await asyncio.sleep(0.05)
    return []


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dsv3_jax.bench.hostile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--pause", type=float, default=0.1, metavar="S", help="of a client between acts, on average")
    parser.add_argument("--url", help="of another server, with its /v1; default: one of our own")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--vocab-size", type=int, default=1000, help="prompts at a URL are of ids below this")
    parser.add_argument("--seed", type=int, default=0, help="of what clients do")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_with_servers(main)
