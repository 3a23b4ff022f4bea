"""What is served, and how it fares."""

from importlib.metadata import version as installed

from fastapi import Request
from fastapi.responses import HTMLResponse, Response

from dsv3_jax.serving.errors import Unavailable
from dsv3_jax.serving.http.errors import UnknownModel
from dsv3_jax.serving.http.page import page
from dsv3_jax.serving.http.served import Served, json_response, served_by
from dsv3_jax.serving.metrics import CONTENT_TYPE


async def health() -> Response:
    """200 while the process lives."""
    return json_response({"status": "alive"})


async def ready(request: Request) -> Response:
    """200 while requests are taken and steps advance, else 503."""
    engine = served_by(request).engine
    if engine.state != "ready":
        raise Unavailable(f"the engine is {engine.state}.")
    if engine.is_stalled:
        raise Unavailable(f"no step ended for {engine.serving.stall_seconds:g} seconds while work waits.")
    return json_response({"status": "ready"})


async def models(request: Request) -> Response:
    """The one model."""
    return json_response({"object": "list", "data": [_card(served_by(request))]})


async def one_model(model: str, request: Request) -> Response:
    """A model by its name."""
    served = served_by(request)
    if model != served.model_name:
        raise UnknownModel(f"model {ascii(model)[:100]} is not served here; use {served.model_name!r}.", param="model")
    return json_response(_card(served))


async def metrics(request: Request) -> Response:
    """Counters in Prometheus' text format."""
    served = served_by(request)
    text = served.engine.metrics.render(namespace=served.metrics_namespace, model_name=served.model_name)
    return Response(text, headers={"content-type": CONTENT_TYPE})


async def version() -> Response:
    """The version of this server."""
    return json_response({"version": installed("dsv3-jax")})


async def root() -> Response:
    """A page to try the model."""
    html, headers = page()
    return HTMLResponse(html, headers=headers)


def _card(served: Served) -> dict[str, object]:
    return {
        "id": served.model_name,
        "object": "model",
        "created": served.created,
        "owned_by": "dsv3-jax",
        "max_model_len": served.engine.max_length,
        "max_output_tokens": served.most_tokens(is_chat=served.chat is not None),
    }
