"""Which prompts an engine takes."""

from collections.abc import Sequence
from typing import NamedTuple

from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.serving.errors import Overloaded, RequestError


class Queue(NamedTuple):
    """Completions that wait, and the tokens of their prompts."""

    num_requests: int
    num_tokens: int


def checked_ids(prompt_ids: Sequence[int], *, vocab_size: int) -> tuple[int, ...]:
    """The prompt, unless it is empty or holds an id that is no token."""
    prompt = tuple(int(token) for token in prompt_ids)
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token, such as bos.", param="prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        foreign = next(token for token in prompt if not 0 <= token < vocab_size)
        raise RequestError(
            f"the prompt holds the id {foreign}, outside 0..{vocab_size - 1}; is it from another tokenizer?",
            param="prompt",
        )
    return prompt


def tokens_to_come(
    num_prompt_tokens: int, max_tokens: int | None, *, max_length: int, max_output_tokens: int | None
) -> int:
    """How many tokens may follow the prompt: `max_tokens`, or as many as are allowed where it is None."""
    if max_output_tokens is not None:
        _check_apart(num_prompt_tokens, max_tokens, max_length=max_length, max_output_tokens=max_output_tokens)
        return max_output_tokens if max_tokens is None else max_tokens
    room = max_length - num_prompt_tokens
    if room < (1 if max_tokens is None else max_tokens):
        asked = "" if max_tokens is None else f" and max_tokens={max_tokens}"
        raise RequestError(
            f"the prompt has {num_prompt_tokens} tokens{asked}; together they may be at most {max_length}. "
            "Shorten either.",
            param="prompt" if room < 1 else "max_tokens",
        )
    return room if max_tokens is None else max_tokens


def _check_apart(num_prompt_tokens: int, max_tokens: int | None, *, max_length: int, max_output_tokens: int) -> None:
    """Raises where the prompt or its completion is longer than its own part of the room."""
    if max_tokens is not None and max_tokens > max_output_tokens:
        raise RequestError(
            f"max_tokens={max_tokens}, but a completion may have at most {max_output_tokens} tokens here. Lower it.",
            param="max_tokens",
        )
    most = max_length - max_output_tokens
    if num_prompt_tokens > most:
        raise RequestError(
            f"the prompt has {num_prompt_tokens} tokens; here it may have at most {most}, as {max_output_tokens} of "
            f"{max_length} are kept for the completion. Shorten it.",
            param="prompt",
        )


def check_queue(waiting: Queue, more: Queue, *, serving: ServingConfig) -> None:
    """Raises `Overloaded` where `more` may not wait beside what does; where nothing waits, whatever fits may."""
    if not waiting.num_requests:
        return
    for what, has, asks, most in (
        ("completions", waiting.num_requests, more.num_requests, serving.max_waiting_requests),
        ("tokens of prompts", waiting.num_tokens, more.num_tokens, serving.max_waiting_tokens),
    ):
        if has + asks > most:
            raise Overloaded(f"{has} {what} wait, and with {asks} more they exceed {most}; try again later.")
