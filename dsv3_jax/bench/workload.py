"""Requests to measure a server with: how long, of which tokens, and when they come."""

import dataclasses

import numpy as np

SHARE_GPT_PROMPT, SHARE_GPT_ANSWER = 220, 190
"""Mean lengths of ShareGPT's conversations, in tokens."""
_SIGMA = 1.0
"""Of the logarithm of a length: half of the requests are shorter than 0.61 of the mean."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how many tokens to generate behind it."""

    prompt: tuple[int, ...]
    num_tokens: int


def requests(
    rng: np.random.Generator,
    count: int,
    *,
    vocab_size: int,
    max_length: int,
    prefix_tokens: int = 0,
    lengths: tuple[int, int] | None = None,
) -> list[Request]:
    """Random prompts behind `prefix_tokens` that all share, with their answers no longer than `max_length`.

    Args:
        lengths: of every prompt behind the prefix and of every answer; None: log-normal with ShareGPT's means.
    """
    room = max_length - prefix_tokens
    prefix = tuple(rng.integers(0, vocab_size, prefix_tokens).tolist())
    made = []
    for _ in range(count):
        prompt, answer = lengths or (_length(rng, SHARE_GPT_PROMPT), _length(rng, SHARE_GPT_ANSWER))
        prompt = max(1, min(prompt, room // 2 if lengths is None else room - 1))
        answer = max(1, min(answer, room - prompt))
        made.append(Request(prefix + tuple(rng.integers(0, vocab_size, prompt).tolist()), answer))
    return made


def arrivals(rng: np.random.Generator, count: int, rate: float | None) -> list[float]:
    """When each request comes, in seconds: a Poisson process of `rate` a second; all at once without."""
    return [0.0] * count if rate is None else np.cumsum(rng.exponential(1 / rate, count)).tolist()


def _length(rng: np.random.Generator, mean: float) -> int:
    return int(np.ceil(rng.lognormal(np.log(mean) - _SIGMA**2 / 2, _SIGMA)))
