"""The OpenAPI schema, with what only the engine knows: the model's name, its limits."""

from typing import Any

from fastapi import FastAPI

from dsv3_jax.serving.http.served import Served

Schema = dict[str, Any]


def add_schema(app: FastAPI, served: Served, *, has_key: bool) -> None:
    """Puts limits into the schema that the app gives at /openapi.json."""
    plain = app.openapi

    def openapi() -> Schema:
        if app.openapi_schema is None:
            schema = plain()
            _name(schema, served.model_name)
            for name in ("CompletionRequest", "ChatRequest", "DetokenizeRequest"):
                if name in schema["components"]["schemas"]:
                    _limit(schema["components"]["schemas"][name]["properties"], served)
            if served.chat is not None:
                _limit_thinking(schema["components"]["schemas"], served.chat.name)
            if has_key:
                _secure(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi


def _name(schema: Schema, model_name: str) -> None:
    """Only one model can be asked for."""
    names = {"type": "string", "enum": [model_name]}
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # a wrong body answers 400
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = names
    components = schema["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        components.pop(unused, None)
    for name in ("CompletionRequest", "ChatRequest"):
        if name in components:
            components[name]["properties"]["model"] = names
    for name in ("TokenizeText", "TokenizeChat", "DetokenizeRequest"):
        if name in components:
            components[name]["properties"]["model"] = {"anyOf": [names, {"type": "null"}]}


def _limit(properties: Schema, served: Served) -> None:
    """Limits of the fields that a body has."""
    serving, last_id = served.engine.serving, served.engine.cfg.vocab_size - 1
    most = served.most_tokens(is_chat="messages" in properties)
    limits: dict[str, dict[str, Schema]] = {
        "max_tokens": {"integer": {"maximum": most}},
        "max_completion_tokens": {"integer": {"maximum": most}},
        "seed": {"integer": {"minimum": -(2**63), "maximum": 2**63 - 1}},  # which FastAPI makes floats of
        "n": {"integer": {"maximum": serving.max_n}},
        "logprobs": {"integer": {"maximum": serving.max_logprobs}},
        "top_logprobs": {"integer": {"maximum": serving.max_logprobs}},
        "logit_bias": {
            "object": {"maxProperties": serving.max_logit_bias, "propertyNames": {"pattern": numbers_up_to(last_id)}}
        },
        "stop": {"array": {"maxItems": serving.max_stop_strings}, "string": {"maxLength": serving.max_stop_characters}},
        "stop_token_ids": {"array": {"maxItems": serving.max_stop_ids}, "integer": {"maximum": last_id}},
        "prompt": {"integer": {"maximum": last_id}},
        "tokens": {"integer": {"maximum": last_id}},
    }
    if "prompt" in properties:
        properties["prompt"]["examples"] = [[0]]
    for name, schema in properties.items():
        _bound(schema, limits.get(name, {}))
    if "prompt" in properties:
        for branch in properties["prompt"]["anyOf"]:
            is_one = branch.get("items", {}).get("type") == "integer"
            if branch["type"] == "array":
                branch["maxItems"] = served.engine.max_prompt_tokens if is_one else serving.max_waiting_requests
    if served.engine.tokenizer is None and "prompt" in properties:
        _leave_out_text(properties)


def _limit_thinking(components: Schema, chat_format: str) -> None:
    """Only V3.1 can be told whether to think."""
    if chat_format == "v3.1":
        return
    always = chat_format == "r1"
    components["Thinking"]["properties"]["type"] = {"type": "string", "enum": ["enabled" if always else "disabled"]}
    components["TemplateSettings"]["properties"]["thinking"] = {"enum": [always, None]}


def _bound(schema: Schema, limits: dict[str, Schema]) -> None:
    """Adds `limits` of a type wherever `schema` speaks of it."""
    for branch in schema.get("anyOf", [schema]):
        if branch.get("type") == "integer":
            branch.update({key: int(branch[key]) for key in ("minimum", "maximum") if key in branch})
        branch.update(limits.get(branch.get("type", ""), {}))
        if "items" in branch:
            _bound(branch["items"], limits)


def _leave_out_text(properties: Schema) -> None:
    """Without a tokenizer, prompts are ids, and no text ends a completion."""
    prompt = properties["prompt"]
    prompt["anyOf"] = [branch for branch in prompt["anyOf"] if "string" not in _types(branch)]
    properties["stop"]["anyOf"] = [branch for branch in properties["stop"]["anyOf"] if "string" not in _types(branch)]


def _types(schema: Schema) -> set[str]:
    """Types that stand in a schema without alternatives, at any depth."""
    return {schema["type"], *(_types(schema["items"]) if "items" in schema else ())}


def _secure(schema: Schema) -> None:
    schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in schema["paths"].items():
        if path not in ("/health", "/ready"):
            for operation in operations.values():
                operation["security"] = [{"key": []}]


def numbers_up_to(last: int) -> str:
    """A regular expression for 0 to `last` in decimal, without leading zeros."""
    digits = str(last)
    shorter = [] if len(digits) == 1 else ["[0-9]", *(f"[1-9][0-9]{{{size}}}" for size in range(1, len(digits) - 1))]
    same = []
    for place, digit in enumerate(digits):
        least, most = int(place == 0 and len(digits) > 1), int(digit) - 1
        if most >= least:
            rest = len(digits) - place - 1
            same.append(digits[:place] + f"[{least}-{most}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return f"^({'|'.join([*shorter, *same, digits])})$"
