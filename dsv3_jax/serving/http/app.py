"""The server's routes around an engine."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import BaseModel

from dsv3_jax.serving.chat_format import ChatFormat
from dsv3_jax.serving.http import answers, status
from dsv3_jax.serving.http.chat import create_chat
from dsv3_jax.serving.http.completions import create_completion
from dsv3_jax.serving.http.errors import add_error_handlers
from dsv3_jax.serving.http.guard import Guard
from dsv3_jax.serving.http.openapi import add_schema
from dsv3_jax.serving.http.served import Served
from dsv3_jax.serving.http.text_routes import detokenize, tokenize
from dsv3_jax.serving.metrics import CONTENT_TYPE

if TYPE_CHECKING:
    from dsv3_jax.serving.engine import Engine

_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_STREAM = {"text/event-stream": {"schema": _EVENT}}
_ALWAYS = (400, 401, 405, 408, 413, 415, 431, 500)
"""Errors that any route may answer."""


def create_app(
    engine: "Engine",
    *,
    model_name: str,
    api_key: str | None = None,
    chat_format: ChatFormat | None = None,
    metrics_namespace: str = "dsv3",
) -> FastAPI:
    """An ASGI application that serves `engine` under OpenAI's routes.

    Args:
        engine: it may still be starting; until it is ready, requests get 503.
        model_name: what clients call the model.
        api_key: every route but /health and /ready asks for it; None: nobody does.
        chat_format: how conversations become prompts; None: no chats.
        metrics_namespace: before the name of every metric.
    """
    app = FastAPI(title="dsv3-jax", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.served = Served(engine, model_name, chat_format, metrics_namespace)
    _add_routes(app, has_text=engine.tokenizer is not None, has_chats=chat_format is not None)
    add_error_handlers(app)
    app.add_middleware(Guard, serving=engine.serving, api_key=api_key)  # pyright: ignore[reportArgumentType]
    add_schema(app, app.state.served, has_key=api_key is not None)
    return app


def _add_routes(app: FastAPI, *, has_text: bool, has_chats: bool) -> None:
    """Routes that this model cannot answer are left out of the schema; they answer 400."""
    add = app.add_api_route
    post: dict[str, Any] = {"methods": ["POST"], "response_model": None}
    streams = _responses(answers.CompletionAnswer, 404, 429, 503, content=_STREAM)
    add("/v1/completions", create_completion, **post, responses=streams)
    streams = _responses(answers.ChatAnswer, 404, 429, 503, content=_STREAM)
    add("/v1/chat/completions", create_chat, **post, responses=streams, include_in_schema=has_chats)
    cut = _responses(answers.TokenizeAnswer, 404)
    add("/tokenize", tokenize, **post, responses=cut, include_in_schema=has_text)
    joined = _responses(answers.DetokenizeAnswer, 404)
    add("/detokenize", detokenize, **post, responses=joined, include_in_schema=has_text)

    get: dict[str, Any] = {"methods": ["GET"], "response_model": None}
    add("/v1/models", status.models, **get, responses=_responses(answers.ModelList))
    add("/v1/models/{model:path}", status.one_model, **get, responses=_responses(answers.ModelCard, 404))
    add("/health", status.health, **get, responses=_responses(answers.StatusAnswer))
    add("/ready", status.ready, **get, responses=_responses(answers.StatusAnswer, 503))
    add("/version", status.version, **get, responses=_responses(answers.VersionAnswer))
    text = {CONTENT_TYPE.partition(";")[0]: {"schema": {"type": "string"}}}
    add("/metrics", status.metrics, **get, responses=_responses(None, content=text))
    add("/", status.root, **get, responses=_responses(None, content={"text/html": {"schema": {"type": "string"}}}))


def _responses(
    model: type[BaseModel] | None, *errors: int, content: Mapping[str, Any] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The documented answers of a route."""
    good: dict[str, Any] = {"description": "OK"}
    if model is not None:
        good["model"] = model
    if content is not None:
        good["content"] = dict(content)
    return {200: good, **{code: {"model": answers.ErrorAnswer} for code in (*_ALWAYS, *errors)}}
