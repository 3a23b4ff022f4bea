"""`POST /tokenize` and `POST /detokenize`."""

from typing import Any

from fastapi import Request
from fastapi.responses import Response

from dsv3_jax.serving.errors import RequestError
from dsv3_jax.serving.http.chat import chat_ids
from dsv3_jax.serving.http.logprobs import Tokens
from dsv3_jax.serving.http.protocol import DetokenizeRequest, TokenizeChat, TokenizeText
from dsv3_jax.serving.http.served import json_response, off_the_loop, served_by


async def tokenize(body: TokenizeText | TokenizeChat, request: Request) -> Response:
    """The tokens of a text, or of a conversation."""
    served = served_by(request)
    served.check_model(body.model)
    if isinstance(body, TokenizeChat):
        ids = await chat_ids(body, served)
    else:
        tokenizer = served.tokenizer("prompt")
        cut = tokenizer.encode if body.add_special_tokens is False else tokenizer.prompt
        ids = [int(i) for i in await off_the_loop(cut, body.prompt)]
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": served.engine.max_length, "tokens": ids}
    if body.return_token_strs:
        tokens = Tokens(served.engine.tokenizer)
        answer["token_strs"] = [tokens.text(token) for token in ids]
    return json_response(answer)


async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens."""
    served = served_by(request)
    served.check_model(body.model)
    tokenizer, size = served.tokenizer("tokens"), served.engine.cfg.vocab_size
    for token in body.tokens:
        if token >= size:
            raise RequestError(f"tokens names {token}, outside 0..{size - 1}.", param="tokens")
    return json_response({"prompt": await off_the_loop(tokenizer.decode, body.tokens)})
