"""How a server ends: told to while it answers, and killed."""

import asyncio
import random
import signal
import time
from pathlib import Path

from dsv3_jax.bench.goals import Line, at_most
from dsv3_jax.bench.hostile_acts import Known, Stage, Tally, act, ask_alone, read_tokens
from dsv3_jax.bench.servers import Running, end, our_server

_STREAMS, _LONG = 8, 250
_DRAIN_S = 30.0


async def told_to_end(running: Running, stage: Stage) -> list[Line]:
    """SIGTERM while streams run: they end right, and the process with 0.

    It exits with another code where its engine's pages do not add up when all requests have ended.
    """
    streams = [asyncio.create_task(_is_right_to_the_end(stage, known)) for known in stage.known[:_STREAMS]]
    await asyncio.sleep(0.1)
    start = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    right = await asyncio.gather(*streams)
    code = await asyncio.to_thread(running.process.wait, _DRAIN_S + 30)
    seconds = time.monotonic() - start
    return [
        Line("exit code after SIGTERM", code, "", "= 0", code == 0),
        at_most("end after SIGTERM", seconds, _DRAIN_S, "s"),
        Line("of the streams that ran at SIGTERM, those cut", right.count(False), "", "= 0", all(right)),
    ]


async def _is_right_to_the_end(stage: Stage, known: Known) -> bool:
    """Streams more than is known; whether all of it comes, and begins as it should."""
    try:
        found = await read_tokens(stage, "SIGTERM", stage.body(known, stream=True, max_tokens=_LONG))
    except (OSError, ValueError, EOFError):
        return False
    return found is not None and len(found) == _LONG and tuple(found[: len(known.tokens)]) == known.tokens


def killed_and_restarted(folder: Path, port: int, stage: Stage) -> list[Line]:
    """kill -9 under load, and at once another server on the same port, which answers right."""
    with our_server(folder, port=port) as first:
        asyncio.run(_kill(first, stage))
    with our_server(folder, port=port) as second:
        known = stage.known[0]
        is_right = asyncio.run(ask_alone(stage, known)) == known.tokens
        code = end(second.process)
    return [
        Line("right answers after kill -9 and a start on the same port", float(is_right), "", "= 1", is_right),
        Line("its start", second.seconds_to_ready, "s"),
        Line("exit code of an idle server after SIGTERM", code, "", "= 0", code == 0),
    ]


async def _kill(running: Running, stage: Stage) -> None:
    """Ends the process while it works; what its clients see then is nobody's fault."""
    unjudged = Stage(stage.target, stage.known, stage.longest, Tally())
    clients = [asyncio.create_task(act(unjudged, random.Random(seed))) for seed in range(_STREAMS)]
    await asyncio.sleep(0.2)
    running.process.kill()
    await asyncio.to_thread(running.process.wait)
    await asyncio.gather(*clients)
