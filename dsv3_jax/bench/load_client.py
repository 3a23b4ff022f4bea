"""Load on an OpenAI-compatible server: many streaming clients."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_jax.bench.http_client import Response, Server, events, send
from dsv3_jax.bench.latency import Answer
from dsv3_jax.bench.workload import Request
from dsv3_jax.config.check import UserError

_SECONDS = 600.0
"""What one request may take."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A served model."""

    server: Server
    model: str
    key: str | None = None
    is_plain: bool = False
    """Prompts go as words and nothing that is not OpenAI's: for servers that know neither ids nor `ignore_eos`."""

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    def body(self, request: Request, **sampling: Any) -> dict[str, Any]:
        """What to post to /completions; greedy unless `sampling` says otherwise."""
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(request.prompt),
            "max_tokens": request.num_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.is_plain:
            body["prompt"] = words(request.prompt)
        else:
            body |= {"ignore_eos": True, "return_token_ids": True}
        return body | sampling


def words(ids: Sequence[int]) -> str:
    """A text that the tokenizer of `random_model.export_for_peers` reads as `ids`, and any other as words."""
    return " ".join(f"w{token}" for token in ids)


async def find(url: str, *, model: str | None, key: str | None, is_plain: bool) -> tuple[Target, int | None]:
    """The server's `model`, or the first that it lists, and how long it says that prompt and answer may be.

    Raises:
        UserError: nothing answers there, or lists no model.
    """
    server = Server.at(url)
    target = Target(server, model or "", key, is_plain)
    try:
        async with asyncio.timeout(_SECONDS), send(server, "GET", "/models", headers=target.headers) as response:
            status, text = response.status, await response.read()
        models = json.loads(text)["data"] if status == 200 else []
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"--url {url}: no OpenAI-compatible server answers ({error}); give http://HOST:PORT/v1.") from (
            error
        )
    if status != 200 or not (model or models):
        raise UserError(f"--url {url}: /models answers {status} {text[:200]!r}; give --key or --model.")
    lengths = {entry["id"]: entry.get("max_model_len") for entry in models}
    name = model or models[0]["id"]
    return dataclasses.replace(target, model=name), lengths.get(name)


async def ask(target: Target, request: Request, **sampling: Any) -> Answer:
    """Sends one request and reads its answer to the end.

    Raises:
        RuntimeError: the server refuses it, reports an error, or gives no content.
    """
    body = target.body(request, **sampling)
    sent = time.perf_counter()
    async with (
        asyncio.timeout(_SECONDS),
        send(target.server, "POST", "/completions", body, headers=target.headers) as response,
    ):
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {(await response.read())[:300]!r}")
        times, usage = await _read(response)
    if not times:
        raise RuntimeError("the answer has no content")
    usage = usage or {"prompt_tokens": len(request.prompt), "completion_tokens": len(times)}
    return Answer(sent, tuple(times), usage["prompt_tokens"], usage["completion_tokens"])


async def run(
    target: Target,
    requests: Sequence[Request],
    *,
    concurrency: int,
    due: Sequence[float] | None = None,
    advance: Callable[[int], None] = lambda amount: None,
    **sampling: Any,
) -> tuple[list[Answer], list[str], float]:
    """Answers, errors, and the seconds that all took.

    A request is sent when it is due (see `workload.arrivals`) and one of `concurrency` clients is free; its clock
    starts when it is sent.
    """
    answers: list[Answer] = []
    errors: list[str] = []
    waiting = iter(zip(requests, due or [0.0] * len(requests), strict=True))
    start = time.perf_counter()

    async def client() -> None:
        for request, moment in waiting:
            await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
            try:
                answers.append(await ask(target, request, **sampling))
            except (OSError, RuntimeError, ValueError, EOFError) as error:  # counted, shown, never hidden
                errors.append(f"{type(error).__name__}: {error}")
            advance(1)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return answers, errors, time.perf_counter() - start


async def _read(response: Response) -> tuple[list[float], dict[str, int] | None]:
    """When each piece with content came, and what the server says was used."""
    times: list[float] = []
    usage: dict[str, int] | None = None
    async for event in events(response.body):
        if "error" in event:
            raise RuntimeError(str(event["error"])[:300])
        usage = event.get("usage") or usage
        if any(choice.get("text") or choice.get("token_ids") for choice in event.get("choices") or ()):
            times.append(time.perf_counter())
    return times, usage
