"""Bookkeeping over the pieces of a call: joined, counted, gathered."""

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from dsv3_jax.serving.outputs import Delta, RequestOutput


def joined(pieces: Iterable[Delta]) -> list[Delta]:
    """One piece for each completion, in the order in which they began."""
    found: dict[int, Delta] = {}
    for piece in pieces:
        before = found.get(piece.index)
        found[piece.index] = piece if before is None else _behind(before, piece)
    return list(found.values())


def _behind(first: Delta, second: Delta) -> Delta:
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or ()) + (second.logprobs or ())
    return second._replace(
        text=first.text + second.text,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs if second.prompt_logprobs is None else second.prompt_logprobs,
    )


class Usage:
    """Tokens of a call, counted as its pieces pass."""

    def __init__(self, prompts: Sequence[Sequence[int]], n: int) -> None:
        self._num_prompt_tokens, self._n = sum(map(len, prompts)), n
        self._num_cached: dict[int, int] = {}
        self._num_tokens = 0

    def count(self, piece: Delta) -> None:
        """Adds a piece."""
        self._num_tokens += len(piece.token_ids)
        if piece.index % self._n == 0:  # a prompt counts once, however many completions it has
            self._num_cached[piece.index] = piece.num_cached_tokens

    def so_far(self) -> dict[str, Any]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached.values())},
        }


async def gathered(
    pieces: AsyncIterator[list[Delta]], prompts: Sequence[Sequence[int]], *, n: int, usage: Usage
) -> list[RequestOutput]:
    """Whole completions, in order."""
    outputs = [RequestOutput(request_id="", prompt_token_ids=tuple(prompt)) for prompt in prompts for _ in range(n)]
    async for arrived in pieces:
        for piece in arrived:
            outputs[piece.index].add(piece)
            usage.count(piece)
    return outputs
