"""How one request's tokens are chosen, and when it ends."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.serving.errors import RequestError

_RANGES = {
    "temperature": (0.0, math.inf),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, math.inf),
}
_OPEN_BELOW = ("top_p", "repetition_penalty")
"""Whose least value is excluded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's sampling, in vLLM's names; greedy by default.

    Logits are changed in this order: repetition, frequency and presence penalty, `logit_bias`, temperature, min_p,
    top_k, top_p. Log-probabilities are those of the model, softmax(logits), before all of it.
    """

    max_tokens: int | None = 16
    """None: as many as fit. 0 only reads the prompt."""
    min_tokens: int = 0
    """No stop id before so many tokens."""
    temperature: float = 0.0
    """0: the likeliest token."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 (or -1): all."""
    top_p: float = 1.0
    """Only the smallest set of tokens with at least this probability."""
    min_p: float = 0.0
    """Only tokens at least this likely, as a share of the likeliest one's probability."""
    presence_penalty: float = 0.0
    """Off the logit of every token that was generated."""
    frequency_penalty: float = 0.0
    """Off the logit of a token for each time that it was generated."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or generated."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    """With one, the same tokens every time; completion i of n draws with seed + i."""
    n: int = 1
    """Completions of the prompt."""
    stop: Sequence[str] = ()
    """Texts that end the completion."""
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    """The completion's text ends with what stopped it."""
    ignore_eos: bool = False
    """Only `stop_token_ids`, `stop` and `max_tokens` end it."""
    logprobs: int | None = None
    """Log-probabilities of the tokens, and of so many likeliest ones in their places."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise RequestError(f"{name}={value!r} is not a finite number; give one.", param=name)
            is_low = value <= least if name in _OPEN_BELOW else value < least
            if is_low or value > most:
                opening = "(" if name in _OPEN_BELOW else "["
                raise RequestError(f"{name}={value} must lie in {opening}{least}, {most}].", param=name)
        for name, least in (("max_tokens", 0), ("min_tokens", 0), ("top_k", -1), ("n", 1), ("logprobs", 0)):
            _check_whole(name, getattr(self, name), least, optional=name in ("max_tokens", "logprobs"))
        _check_whole("prompt_logprobs", self.prompt_logprobs, 0, optional=True)
        _check_whole("seed", self.seed, -(2**63), optional=True)
        if self.seed is not None and self.seed >= 2**64:
            raise RequestError(f"seed={self.seed} has more than 64 bits; give a smaller one.", param="seed")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}; lower it.", param="min_tokens"
            )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop holds {text!r}; give texts that are not empty.", param="stop")
        for token in self.stop_token_ids:
            _check_whole("stop_token_ids", token, 0)
        for token, bias in self.logit_bias.items():
            _check_whole("logit_bias", token, 0)
            if not isinstance(bias, int | float) or isinstance(bias, bool) or not -100 <= bias <= 100:
                raise RequestError(f"logit_bias of token {token} is {bias!r}; give -100 to 100.", param="logit_bias")


def check_limits(params: SamplingParams, *, vocab_size: int, has_tokenizer: bool, serving: ServingConfig) -> None:
    """Raises `RequestError` where `params` exceed a limit of the engine or name a token that is none."""
    counts = {
        "n": (params.n, serving.max_n),
        "logprobs": (params.logprobs or 0, serving.max_logprobs),
        "prompt_logprobs": (params.prompt_logprobs or 0, serving.max_logprobs),
        "logit_bias": (len(params.logit_bias), serving.max_logit_bias),
        "stop": (len(params.stop), serving.max_stop_strings),
        "stop_token_ids": (len(params.stop_token_ids), serving.max_stop_ids),
    }
    for name, (count, most) in counts.items():
        if count > most:
            raise RequestError(f"{name} asks for {count}; at most {most} are allowed.", param=name)
    for text in params.stop:
        if len(text) > serving.max_stop_characters:
            raise RequestError(
                f"a stop string has {len(text)} characters; at most {serving.max_stop_characters} are allowed.",
                param="stop",
            )
    if params.stop and not has_tokenizer:
        raise RequestError("stop strings need a tokenizer, which this model lacks; use stop_token_ids.", param="stop")
    for name in ("stop_token_ids", "logit_bias"):
        for token in getattr(params, name):
            if token >= vocab_size:
                raise RequestError(f"{name} names token {token}, outside 0..{vocab_size - 1}.", param=name)


def every(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    """One for each prompt, from one for all or as many as there are."""
    each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * num_prompts
    if len(each) != num_prompts:
        raise RequestError(f"{len(each)} params for {num_prompts} prompts; give one, or one for each.")
    return each


def _check_whole(name: str, value: object, least: int, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if type(value) is not int or value < least:
        raise RequestError(f"{name}={value!r} must be a whole number of at least {least}.", param=name)
