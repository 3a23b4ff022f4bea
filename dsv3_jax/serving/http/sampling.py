"""A request's fields as the engine's sampling parameters."""

import re

from dsv3_jax.serving.errors import RequestError
from dsv3_jax.serving.http.protocol import ChatRequest, CompletionRequest, Request
from dsv3_jax.serving.params import SamplingParams

DEFAULT_MAX_TOKENS = 16
"""Of completions, as OpenAI's; a chat gets as many as fit."""

_COLDEST = 1e-5
"""Temperatures below it are 0, as in vLLM: logits divided by them overflow."""

_LEAST_TOP_P = 1e-6
"""float32 cannot tell less from 0, which is no share."""

_MANY = 2**30
"""More tokens than any completion has; positions are 32-bit numbers."""

_ID = re.compile(r"0|[1-9][0-9]{0,9}")


def check_max_tokens(body: Request, *, most: int) -> None:
    """Raises where more than `most` tokens are asked for; also by a field that another one goes before."""
    for name in ("max_tokens", "max_completion_tokens"):
        asked = getattr(body, name, None)
        if asked is not None and asked > most:
            raise RequestError(f"{name}={asked} is too much for a completion; ask for at most {most}.", param=name)


def completion_params(body: CompletionRequest, *, most: int) -> SamplingParams:
    """Of `POST /v1/completions`, where a completion may have `most` tokens."""
    max_tokens = min(DEFAULT_MAX_TOKENS, most) if body.max_tokens is None else body.max_tokens
    prompt_logprobs = body.logprobs if body.echo else None
    return _params(body, max_tokens=max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)


def chat_params(body: ChatRequest) -> SamplingParams:
    """Of `POST /v1/chat/completions`."""
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs or body.top_logprobs else None
    return _params(body, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=None)


def _params(
    body: Request, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(body.min_tokens or 0, _MANY if max_tokens is None else max_tokens),
        temperature=0.0 if temperature < _COLDEST else temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else max(body.top_p, _LEAST_TOP_P),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_bias(body.logit_bias or {}),
        seed=body.seed,
        n=1 if body.n is None else body.n,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _bias(given: dict[str, float]) -> dict[int, float]:
    for key in given:
        if not _ID.fullmatch(key):
            raise RequestError(f"logit_bias has the key {ascii(key)[:100]}; give token ids.", param="logit_bias")
    return {int(key): value for key, value in given.items()}
