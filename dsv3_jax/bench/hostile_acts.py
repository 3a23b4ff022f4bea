"""What a hostile client does to a server, and whether the answer is one that a good server gives."""

import asyncio
import collections
import contextlib
import dataclasses
import json
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

from dsv3_jax.bench.http_client import Response, events, read_response, request_bytes, send
from dsv3_jax.bench.load_client import Target
from dsv3_jax.config.check import check

PATIENCE_S = 120.0
"""After which an answer counts as none."""


@dataclasses.dataclass(frozen=True)
class Known:
    """A request whose answer is known."""

    prompt: tuple[int, ...]
    sampling: dict[str, Any]
    tokens: tuple[int, ...]


@dataclasses.dataclass
class Tally:
    """What came of all acts."""

    acts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    statuses: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    compared: int = 0
    """Answers that were laid beside a known one."""
    faults: list[str] = dataclasses.field(default_factory=list)
    """Wrong answers, answers of 500 and above, refusals of what is right, consent to what is wrong, and no answer."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """What an act needs."""

    target: Target
    known: Sequence[Known]
    longest: int
    """Tokens of prompt and answer that the server allows."""
    tally: Tally

    def body(self, known: Known, **more: Any) -> dict[str, Any]:
        """What to post for a known answer."""
        body: dict[str, Any] = {"model": self.target.model, "prompt": list(known.prompt), "ignore_eos": True}
        body |= {"max_tokens": len(known.tokens), "return_token_ids": True, "temperature": 0}
        return body | known.sampling | more

    def judge(self, what: str, status: int, text: bytes, allowed: Sequence[int]) -> bool:
        """Counts an answer; whether it is 200."""
        self.tally.statuses[status] += 1
        if status not in allowed:
            self.tally.faults.append(f"{what}: {status} {text[:200]!r}")
        elif status >= 400:
            with self.at_fault(f"{what}: an error without its four fields, {text[:200]!r}"):
                assert json.loads(text)["error"].keys() >= {"message", "type", "param", "code"}
        return status == 200

    def compare(self, what: str, known: Known, found: Sequence[int]) -> None:
        """Lays an answer beside the known one."""
        self.tally.compared += 1
        if tuple(found) != known.tokens:
            self.tally.faults.append(f"{what}: {list(found)} where {list(known.tokens)} is right ({known.sampling})")

    @contextlib.contextmanager
    def at_fault(self, what: str) -> Iterator[None]:
        """What does not hold inside is a fault."""
        try:
            yield
        except (AssertionError, KeyError, TypeError, ValueError):
            self.tally.faults.append(what)


Act = Callable[[Stage, random.Random], Awaitable[None]]
_GOOD = (200, 429)
"""The answer, or too many wait."""


async def complete(stage: Stage, rng: random.Random) -> None:
    """Asks for a known answer, whole."""
    known = rng.choice(stage.known)
    async with _post(stage, stage.body(known)) as response:
        text = await response.read()
    if stage.judge("complete", response.status, text, _GOOD):
        with stage.at_fault(f"complete: {text[:200]!r}"):
            stage.compare("complete", known, json.loads(text)["choices"][0]["token_ids"])


async def stream(stage: Stage, rng: random.Random) -> None:
    """Asks for a known answer in pieces."""
    known = rng.choice(stage.known)
    await _read_stream(stage, "stream", known, stage.body(known, stream=True))


async def read_slowly(stage: Stage, rng: random.Random) -> None:
    """Reads a large answer through a small window."""
    known = rng.choice(stage.known)
    body = stage.body(known, stream=True, logprobs=rng.choice([5, 20]), n=1)
    await _read_stream(stage, "read slowly", known, body, window=2048, pause=rng.uniform(0.005, 0.05))


async def read_nothing(stage: Stage, rng: random.Random) -> None:
    """Asks for megabytes, reads none of them, and goes away."""
    body = stage.body(rng.choice(stage.known), stream=True, logprobs=20, n=16, max_tokens=150)
    async with _connection(stage, 2048) as (_, writer):
        writer.write(request_bytes(stage.target.server, "POST", "/completions", body, stage.target.headers))
        await writer.drain()
        await asyncio.sleep(rng.uniform(1.0, 5.0))


async def leave_a_stream(stage: Stage, rng: random.Random) -> None:
    """Goes away after some pieces."""
    body = stage.body(rng.choice(stage.known), stream=True, max_tokens=rng.randint(20, 200), n=rng.choice([1, 1, 3]))
    pieces = rng.randint(0, 12)
    async with _post(stage, body) as response:
        is_good = response.status == 200
        if stage.judge("leave a stream", response.status, b"" if is_good else await response.read(), _GOOD):
            async for _ in response.body:
                pieces -= 1
                if pieces < 0:
                    break


async def leave_an_answer(stage: Stage, rng: random.Random) -> None:
    """Goes away while the server works."""
    body = stage.body(rng.choice(stage.known), max_tokens=rng.randint(50, 200), n=rng.choice([1, 2, 4]))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(rng.uniform(0.0, 0.5)), _post(stage, body) as response:
            await response.read()


async def leave_a_request(stage: Stage, rng: random.Random) -> None:
    """Sends the beginning of a request, waits, and goes away."""
    whole = request_bytes(stage.target.server, "POST", "/completions", stage.body(rng.choice(stage.known)))
    async with _connection(stage) as (_, writer):
        writer.write(whole[: rng.randint(1, len(whole) - 1)])
        await writer.drain()
        await asyncio.sleep(rng.uniform(0.0, 2.0))


async def ask_for_too_much(stage: Stage, rng: random.Random) -> None:
    """A prompt, an answer or a parameter beyond a limit."""
    longest, known = stage.longest, rng.choice(stage.known)
    wrong: dict[str, Any] = rng.choice(
        [
            {"prompt": [1] * (longest + 1)},
            {"prompt": [1] * rng.randint(longest, 3 * longest)},
            {"max_tokens": longest},
            {"max_tokens": 10**12},
            {"n": 17},
            {"logprobs": 21},
            {"stop": ["ab"] * 17},
            {"stop": ["x" * 257]},
            {"stop_token_ids": [1] * 65},
            {"logit_bias": {str(token): 1 for token in range(1025)}},
            {"prompt": [10**9]},
        ]
    )
    await _refused(stage, f"ask for too much ({next(iter(wrong))})", stage.body(known, **wrong))


async def ask_nonsense(stage: Stage, rng: random.Random) -> None:
    """A field of the wrong type or out of its range."""
    wrong: dict[str, Any] = rng.choice(
        [
            {"prompt": rng.choice([[], None, 5, [[]], [-1], ["a", 1], {"a": 1}])},
            {"temperature": rng.choice([-1, float("nan"), float("inf"), 1e300, "hot", [0]])},
            {"top_p": rng.choice([0, 1.5, float("nan"), "all"])},
            {"max_tokens": rng.choice([-1, 1.5, "many", [1]])},
            {"n": rng.choice([0, -1, "two"])},
            {"seed": rng.choice([2**70, "seed", 0.5])},
            {"stop": rng.choice([5, [5], [""]])},
            {"logit_bias": rng.choice([{"a": 1}, {"1": 101}, [1], {"-1": 1}])},
            {"model": rng.choice(["no such model", 5, ""])},
            {"presence_penalty": rng.choice([-2.1, "x"])},
        ]
    )
    body = stage.body(rng.choice(stage.known), stream=rng.random() < 0.5, **wrong)
    await _refused(stage, f"ask nonsense ({wrong})", body)


async def send_garbage(stage: Stage, rng: random.Random) -> None:
    """A body that is no JSON object."""
    whole = json.dumps(stage.body(rng.choice(stage.known))).encode()
    body = rng.choice(
        [
            rng.randbytes(rng.randint(1, 2000)),
            whole[: rng.randint(1, len(whole) - 1)],
            whole.replace(b"model", b"mo\xff\xfedel"),
            b"",
            b"[" * 50_000,
            b'{"a":' * 20_000,
            b"null",
            b"[1, 2]",
            b'"' + b"\\ud800" * 9 + b'"',
        ]
    )
    await _refused(stage, f"send garbage ({body[:40]!r})", body)


async def send_too_much(stage: Stage, rng: random.Random) -> None:
    """A body or headers beyond what a server should read."""
    if rng.random() < 0.5:
        body = b'{"prompt": "' + b"a" * rng.randint(1 << 20, 8 << 20) + b'"}'
        await _refused(stage, "send too large a body", body, allowed=(413,), may_close=True)
        return
    many = {f"x-{number}": "1" for number in range(rng.randint(101, 400))}
    large = {"x-large": "a" * rng.randint(65 << 10, 200 << 10)}
    body, headers = stage.body(rng.choice(stage.known)), rng.choice([many, large])
    await _refused(stage, "send too many headers", body, allowed=(400, 431), may_close=True, headers=headers)


async def go_astray(stage: Stage, rng: random.Random) -> None:
    """A route or method that there is none of."""
    server = stage.target.server
    method, route, status = rng.choice(
        [
            ("GET", "/completions", 405),
            ("POST", "/nothing", 404),
            ("DELETE", "/models", 405),
            ("PUT", "/%00%ff/..", 404),
        ]
    )
    async with send(server, method, route, headers=stage.target.headers) as response:
        stage.judge(f"go astray ({method} {route})", response.status, await response.read(), (status,))


async def speak_otherwise(stage: Stage, rng: random.Random) -> None:
    """Bytes that are no HTTP, or HTTP that lies about its length."""
    line = request_bytes(stage.target.server, "POST", "/completions", b"{}")
    said = rng.choice(
        [
            rng.randbytes(rng.randint(1, 5000)) + b"\r\n\r\n",
            b"GET / FTP/1.1\r\n\r\n",
            line.replace(b"Content-Length: 2", b"Content-Length: -2"),
            line.replace(b"Content-Length: 2", b"Content-Length: 2\r\nContent-Length: 3"),
            line.replace(b"Content-Length: 2", b"Transfer-Encoding: chunked").replace(b"{}", b"zz\r\n"),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        ]
    )
    async with _connection(stage) as (reader, writer):
        writer.write(said)
        with contextlib.suppress(OSError, ValueError, EOFError, TimeoutError):  # closing is an answer, too
            async with asyncio.timeout(2.0):
                response = await read_response(reader)
                text = await response.read()
                stage.tally.statuses[response.status] += 1
                if not 400 <= response.status < 500:
                    stage.tally.faults.append(f"speak otherwise ({said[:40]!r}): {response.status} {text[:200]!r}")


ACTS: tuple[tuple[Act, int], ...] = (
    (complete, 4),
    (stream, 4),
    (read_slowly, 2),
    (read_nothing, 1),
    (leave_a_stream, 3),
    (leave_an_answer, 3),
    (leave_a_request, 1),
    (ask_for_too_much, 2),
    (ask_nonsense, 2),
    (send_garbage, 2),
    (send_too_much, 1),
    (go_astray, 1),
    (speak_otherwise, 1),
)
"""With their weights."""


async def act(stage: Stage, rng: random.Random) -> None:
    """One act, chosen by chance; what a connection does to it is a fault."""
    chosen = rng.choices([act for act, _ in ACTS], [weight for _, weight in ACTS])[0]
    stage.tally.acts[chosen.__name__] += 1
    try:
        async with asyncio.timeout(PATIENCE_S):
            await chosen(stage, rng)
    except (OSError, ValueError, EOFError, TimeoutError) as error:
        stage.tally.faults.append(f"{chosen.__name__}: no answer ({type(error).__name__}: {error})")


async def read_tokens(
    stage: Stage, what: str, body: dict[str, Any], *, window: int | None = None, pause: float = 0.0
) -> list[int] | None:
    """The tokens of a streamed answer; None where there is none."""
    found: list[int] = []
    async with _post(stage, body, window=window) as response:
        is_good = response.status == 200
        if not stage.judge(what, response.status, b"" if is_good else await response.read(), _GOOD):
            return None
        async for event in events(response.body):
            if "error" in event:
                stage.tally.faults.append(f"{what}: {event}")
                return None
            found += (event["choices"] or [{}])[0].get("token_ids") or []
            await asyncio.sleep(pause)
    return found


async def ask_alone(stage: Stage, known: Known) -> tuple[int, ...]:
    """What the server answers to a request whose `tokens` are only as many as the right ones.

    Raises:
        UserError: it refuses.
    """
    async with _post(stage, stage.body(known)) as response:
        text = await response.read()
    check(response.status == 200, f"the server refused the first request: {response.status} {text[:300]!r}.")
    return tuple(json.loads(text)["choices"][0]["token_ids"])


async def _refused(
    stage: Stage,
    what: str,
    body: Any,
    *,
    allowed: Sequence[int] = (400, 404, 413, 429),
    may_close: bool = False,
    **rest: Any,
) -> None:
    """Posts what must not be answered with 200; `may_close`: the server need not read it all."""
    try:
        async with _post(stage, body, **rest) as response:
            text = await response.read()
    except (OSError, EOFError):
        if not may_close:
            raise
        return
    stage.judge(what, response.status, text, allowed)


async def _read_stream(
    stage: Stage, what: str, known: Known, body: dict[str, Any], *, window: int | None = None, pause: float = 0.0
) -> None:
    found = await read_tokens(stage, what, body, window=window, pause=pause)
    if found is not None:
        stage.compare(what, known, found)


@contextlib.asynccontextmanager
async def _post(
    stage: Stage, body: Any, *, window: int | None = None, headers: dict[str, str] | None = None
) -> AsyncIterator[Response]:
    """Posts to /completions; `window`: bytes that may wait to be read."""
    async with _connection(stage, window) as (reader, writer):
        headers = stage.target.headers | (headers or {})
        writer.write(request_bytes(stage.target.server, "POST", "/completions", body, headers))
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            await writer.drain()
        yield await read_response(reader)


@contextlib.asynccontextmanager
async def _connection(
    stage: Stage, window: int | None = None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is cut, not closed, at the end."""
    if window is None:
        reader, writer = await stage.target.server.connect()
    else:
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        plain.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(plain, (stage.target.server.host, stage.target.server.port))
        except OSError:
            plain.close()
            raise
        reader, writer = await asyncio.open_connection(sock=plain, limit=window)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
