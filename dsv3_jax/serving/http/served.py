"""What the routes of one server share."""

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response

from dsv3_jax.data.tokenizer import TextTokenizer
from dsv3_jax.serving.chat_format import ChatFormat
from dsv3_jax.serving.errors import RequestError, Unavailable
from dsv3_jax.serving.http import fields
from dsv3_jax.serving.http.errors import UnknownModel
from dsv3_jax.serving.http.protocol import ChatSettings
from dsv3_jax.serving.http.protocol import Request as Body
from dsv3_jax.serving.http.sampling import check_max_tokens

if TYPE_CHECKING:
    from dsv3_jax.serving.engine import Engine

P = ParamSpec("P")
R = TypeVar("R")

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """An engine under a name."""

    engine: "Engine"
    model_name: str
    chat: ChatFormat | None = None
    """None: no chats."""
    metrics_namespace: str = "dsv3"
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    unknown: fields.Unknown = dataclasses.field(default_factory=fields.Unknown)

    def admit(self, body: Body) -> None:
        """Raises for what can be told from a request's fields alone, and from the engine's state."""
        self.check_model(body.model)
        extra = body.model_extra or {}
        fields.refuse(extra, n=body.n or 1)
        check_max_tokens(body, most=self.most_tokens(is_chat=isinstance(body, ChatSettings)))
        if self.engine.state != "ready":
            raise Unavailable(f"the engine is {self.engine.state}; it takes no requests now.")
        for name in self.unknown.fresh(extra):
            LOG.info("the field %s is taken and left alone; this request is the first that has it", name)

    def check_model(self, name: str | None) -> None:
        """Raises `UnknownModel` for another model than this one; None is this one."""
        if name is not None and name != self.model_name:
            raise UnknownModel(f"model {ascii(name)[:100]} is not served here; use {self.model_name!r}.", param="model")

    def most_tokens(self, *, is_chat: bool) -> int:
        """Tokens of a completion: the engine's limit, or what the shortest prompt leaves room for.

        That is one token, or a turn of a user who says nothing.
        """
        room = self.engine.max_length - (self.shortest_chat if is_chat else 1)
        limit = self.engine.serving.max_output_tokens
        return room if limit is None else min(room, limit)

    @functools.cached_property
    def shortest_chat(self) -> int:
        """Tokens of a conversation in which a user says nothing."""
        return 1 if self.chat is None else len(self.chat.encode([{"role": "user", "content": ""}]))

    def tokenizer(self, param: str) -> TextTokenizer:
        """The tokenizer; `RequestError` where there is none."""
        if self.engine.tokenizer is None:
            raise RequestError(f"{param} needs a tokenizer, which this model lacks; send token ids.", param=param)
        return self.engine.tokenizer

    def chat_format(self, param: str) -> ChatFormat:
        """The format of chats; `RequestError` where there is none."""
        self.tokenizer(param)
        if self.chat is None:
            raise RequestError(
                "this model's chat template is of a kind that is not known; use /v1/completions, or start the server "
                "with --chat-format.",
                param=param,
            )
        return self.chat


def served_by(request: Request) -> Served:
    """What the server of a request serves."""
    return request.app.state.served


def json_response(content: Any) -> Response:
    """A 200 with `content` as JSON."""
    return Response(msgspec.json.encode(content), media_type="application/json")


async def off_the_loop(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """The result of a function that takes long, called in another thread; others are answered meanwhile."""
    return await asyncio.to_thread(function, *args, **kwargs)
