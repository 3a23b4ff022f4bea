"""What an engine gives back."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dsv3_jax.serving.sequence import TokenLogprobs


class Delta(NamedTuple):
    """A piece of one completion, as it comes."""

    index: int
    """Which completion of the call."""
    text: str
    """Whole characters; what may become part of a stop string is held back. Empty without a tokenizer."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    """Of the whole prompt, once, in the first piece; its first token has none."""
    finish_reason: str | None
    """"stop", "length", "tool_calls" or "abort" in the last piece."""
    stop_reason: str | int | None
    """The stop string or the id that ended it; None for eos and lengths."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that were found in the prefix cache."""


@dataclasses.dataclass
class RequestOutput:
    """One completion, whole."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    """One a token, where asked."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One a token of the prompt, None for the first, where asked."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    num_draft_tokens: int = 0
    """Tokens that a draft model proposed."""
    num_accepted_tokens: int = 0
    """Of these, those that were taken."""

    def add(self, delta: Delta) -> None:
        """Puts a piece behind."""
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *delta.logprobs]
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = list(delta.prompt_logprobs)
        self.num_cached_tokens = delta.num_cached_tokens
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


def in_order(
    prompts: Sequence[Sequence[int]], completions: Sequence[int], deltas: Iterable[Delta]
) -> list[RequestOutput]:
    """The pieces put together: the completions of a prompt, so many of each, stand side by side."""
    outputs = [
        RequestOutput(f"{row}-{number}", tuple(prompt))
        for row, (prompt, count) in enumerate(zip(prompts, completions, strict=True))
        for number in range(count)
    ]
    for delta in deltas:
        outputs[delta.index].add(delta)
    return outputs
