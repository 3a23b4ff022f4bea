"""`POST /v1/completions`."""

import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from dsv3_jax.serving.errors import RequestError
from dsv3_jax.serving.http.generation import Generation
from dsv3_jax.serving.http.logprobs import CompletionLogprobs, Tokens
from dsv3_jax.serving.http.logs import REQUEST_ID
from dsv3_jax.serving.http.pieces import Usage, gathered, joined
from dsv3_jax.serving.http.protocol import CompletionRequest
from dsv3_jax.serving.http.sampling import completion_params
from dsv3_jax.serving.http.served import Served, json_response, off_the_loop, served_by
from dsv3_jax.serving.http.sse import EventStream
from dsv3_jax.serving.outputs import Delta, RequestOutput
from dsv3_jax.serving.sequence import TokenLogprobs


async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continues prompts, whole or as a stream of server-sent events."""
    served = served_by(request)
    served.admit(body)
    params = completion_params(body, most=served.most_tokens(is_chat=False))
    prompts = await _prompts(body, served)
    answer = _Answer(served, body, prompts, params.n)
    generation = Generation(served.engine, request.receive)
    generation.submit(prompts, params, priority=body.priority or 0, cache_salt=body.cache_salt or "")
    if body.stream:
        return EventStream(generation, answer.chunks(generation))
    async with generation:
        usage = Usage(prompts, params.n)
        outputs = await gathered(generation.pieces(), prompts, n=params.n, usage=usage)
    choices = [answer.choice(index, output) for index, output in enumerate(outputs)]
    return json_response({**answer.head, "choices": choices, "usage": usage.so_far()})


async def _prompts(body: CompletionRequest, served: Served) -> list[list[int]]:
    """Ids of each prompt."""
    each = _separate(body.prompt)
    most = served.engine.serving.max_waiting_requests
    if len(each) > most:
        raise RequestError(f"prompt holds {len(each)} prompts; send at most {most}.", param="prompt")
    if not isinstance(each[0], str):
        return each
    tokenizer = served.tokenizer("prompt")
    return await off_the_loop(lambda: [tokenizer.prompt(text) for text in each])


def _separate(given: Any) -> list[Any]:
    """Prompts, each by itself."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


@dataclasses.dataclass(frozen=True, eq=False)
class _Answer:
    """How the completions of one call are written down."""

    served: Served
    body: CompletionRequest
    prompts: list[list[int]]
    n: int
    head: dict[str, Any] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        head = {
            "id": f"cmpl-{REQUEST_ID.get()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.served.model_name,
        }
        object.__setattr__(self, "head", head)

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """A whole completion."""
        writer = _Writer(self, index)
        return writer.write(
            output.text,
            output.token_ids,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )

    async def chunks(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream."""
        counts = bool(self.body.stream_options and self.body.stream_options.include_usage)
        usage, writers = Usage(self.prompts, self.n), {}
        async for arrived in generation.pieces():
            for piece in joined(arrived):
                usage.count(piece)
                writer = writers.setdefault(piece.index, _Writer(self, piece.index))
                chunk = {**self.head, "choices": [writer.piece(piece)]}
                yield {**chunk, "usage": None} if counts else chunk
        if counts:
            yield {**self.head, "choices": [], "usage": usage.so_far()}


class _Writer:
    """One completion as it is written: the first piece brings the prompt."""

    def __init__(self, answer: _Answer, index: int) -> None:
        self._body, self._index = answer.body, index
        self._prompt = answer.prompts[index // answer.n]
        self._tokenizer = answer.served.engine.tokenizer
        self._logprobs = CompletionLogprobs(Tokens(self._tokenizer))
        self._is_begun = False

    def piece(self, piece: Delta) -> dict[str, Any]:
        """A choice of a stream."""
        return self.write(
            piece.text,
            piece.token_ids,
            logprobs=piece.logprobs,
            prompt_logprobs=piece.prompt_logprobs,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
        )

    def write(
        self,
        text: str,
        token_ids: Sequence[int],
        *,
        logprobs: Sequence[TokenLogprobs] | None,
        prompt_logprobs: Sequence[TokenLogprobs | None] | None,
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> dict[str, Any]:
        """A choice."""
        is_first, self._is_begun = not self._is_begun, True
        choice: dict[str, Any] = {
            "index": self._index,
            "text": self._echo() + text if is_first else text,
            "logprobs": None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        if self._body.logprobs is not None:
            ids, places = list(token_ids), list(logprobs or ())
            if is_first and self._body.echo:
                ids, places = [*self._prompt, *ids], [*(prompt_logprobs or [None] * len(self._prompt)), *places]
            choice["logprobs"] = self._logprobs.of(ids, places)
        if self._body.return_token_ids:
            choice["token_ids"] = list(token_ids)
            choice["prompt_token_ids"] = self._prompt if is_first else None
        return choice

    def _echo(self) -> str:
        """The prompt's text, where it is asked for."""
        if not self._body.echo or self._tokenizer is None:
            return ""
        given = self._body.prompt
        return given if isinstance(given, str) else self._tokenizer.decode(self._prompt, skip_special=True)
