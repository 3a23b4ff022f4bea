"""`POST /v1/chat/completions`."""

import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import Response

from dsv3_jax.serving.http.generation import Generation
from dsv3_jax.serving.http.logprobs import Tokens, chat_logprobs
from dsv3_jax.serving.http.logs import REQUEST_ID
from dsv3_jax.serving.http.pieces import Usage, gathered, joined
from dsv3_jax.serving.http.protocol import ChatRequest, ChatSettings
from dsv3_jax.serving.http.sampling import chat_params
from dsv3_jax.serving.http.served import Served, json_response, off_the_loop, served_by
from dsv3_jax.serving.http.sse import EventStream
from dsv3_jax.serving.outputs import Delta, RequestOutput
from dsv3_jax.serving.sequence import TokenLogprobs

if TYPE_CHECKING:
    from dsv3_jax.serving.reply_splitter import ReplySplitter


async def create_chat(body: ChatRequest, request: Request) -> Response:
    """Answers a conversation, whole or as a stream of server-sent events."""
    served = served_by(request)
    served.admit(body)
    params = chat_params(body)
    prompt = await chat_ids(body, served)
    answer = _Answer(served, body, prompt)
    generation = Generation(served.engine, request.receive)
    generation.submit([prompt], params, priority=body.priority or 0, cache_salt=body.cache_salt or "")
    if body.stream:
        return EventStream(generation, answer.chunks(generation))
    async with generation:
        usage = Usage([prompt], params.n)
        outputs = await gathered(generation.pieces(), [prompt], n=params.n, usage=usage)
    choices = [answer.choice(index, output) for index, output in enumerate(outputs)]
    whole = {**answer.head("chat.completion"), "choices": choices, "usage": usage.so_far()}
    return json_response(whole | ({"prompt_token_ids": prompt} if body.return_token_ids else {}))


async def chat_ids(body: ChatSettings, served: Served) -> list[int]:
    """The prompt that a conversation makes."""
    chat_format = served.chat_format("messages")
    messages = [message.model_dump(exclude_unset=True) for message in body.messages]
    return await off_the_loop(chat_format.encode, messages, thinking=body.thinks)


@dataclasses.dataclass(frozen=True, eq=False)
class _Answer:
    """How the replies of one call are written down."""

    served: Served
    body: ChatRequest
    prompt: list[int]
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        """What every part of the answer begins with."""
        return {
            "id": f"chatcmpl-{REQUEST_ID.get()}",
            "object": kind,
            "created": self.created,
            "model": self.served.model_name,
        }

    def splitter(self) -> "ReplySplitter":
        """What tells reasoning from content in one reply."""
        return self.served.chat_format("messages").splitter(self.prompt, thinking=self.body.thinks)

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """A whole reply."""
        reply = self.splitter().add(output.text, output.token_ids)
        message = {"role": "assistant", "content": reply.content, "reasoning_content": reply.reasoning or None}
        return {
            "index": index,
            "message": {**message, "refusal": None},
            **self._rest(output.token_ids, output.logprobs, output.finish_reason, output.stop_reason),
        }

    async def chunks(self, generation: Generation) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream."""
        counts = bool(self.body.stream_options and self.body.stream_options.include_usage)
        usage, head = Usage([self.prompt], self.body.n or 1), self.head("chat.completion.chunk")
        splitters: dict[int, ReplySplitter] = {}
        async for arrived in generation.pieces():
            for piece in joined(arrived):
                usage.count(piece)
                is_first = piece.index not in splitters
                splitter = splitters.setdefault(piece.index, self.splitter()) if is_first else splitters[piece.index]
                chunk = {**head, "choices": [self._piece(piece, splitter, is_first=is_first)]}
                if is_first and self.body.return_token_ids:
                    chunk["prompt_token_ids"] = self.prompt
                yield {**chunk, "usage": None} if counts else chunk
        if counts:
            yield {**head, "choices": [], "usage": usage.so_far()}

    def _piece(self, piece: Delta, splitter: "ReplySplitter", *, is_first: bool) -> dict[str, Any]:
        """A choice of a stream; the first one of a reply names who speaks."""
        reply = splitter.add(piece.text, piece.token_ids)
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        if reply.reasoning:
            delta["reasoning_content"] = reply.reasoning
        if reply.content or is_first:
            delta["content"] = reply.content
        rest = self._rest(piece.token_ids, piece.logprobs, piece.finish_reason, piece.stop_reason)
        return {"index": piece.index, "delta": delta, **rest}

    def _rest(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None,
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> dict[str, Any]:
        """What whole replies and pieces share."""
        shown = None
        if self.body.logprobs or self.body.top_logprobs:
            shown = chat_logprobs(Tokens(self.served.engine.tokenizer), token_ids, logprobs or ())
        rest = {"logprobs": shown, "finish_reason": finish_reason, "stop_reason": stop_reason}
        return rest | ({"token_ids": list(token_ids)} if self.body.return_token_ids else {})
