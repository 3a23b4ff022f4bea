"""Latencies of streamed answers, by the definitions of `vllm bench serve`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MEASURES = ("ttft", "tpot", "itl", "e2el")


@dataclasses.dataclass(frozen=True)
class Answer:
    """One request as its client saw it; times are seconds of one clock."""

    sent: float
    arrivals: tuple[float, ...]
    """Of each piece with content."""
    num_prompt_tokens: int
    num_tokens: int

    @property
    def ttft(self) -> float:
        """Time to first token: from sending to the first piece with content."""
        return self.arrivals[0] - self.sent

    @property
    def e2el(self) -> float:
        """End-to-end latency: from sending to the last piece with content."""
        return self.arrivals[-1] - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token behind the first; None for an answer of one token."""
        return (self.e2el - self.ttft) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def itl(self) -> tuple[float, ...]:
        """Inter-token latencies: gaps between pieces."""
        return tuple(after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False))


def summarize(
    answers: Sequence[Answer], *, seconds: float, failed: int = 0, limits: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What `vllm bench serve` saves of a run of `seconds`, under its names: throughputs a second, latencies in ms.

    Args:
        limits: most milliseconds of any of `MEASURES`; a request that meets all of them is good (`request_goodput`
            a second, `good_share` of all sent). The gaps of a request meet a limit if their mean does.
    """
    prompt_tokens = sum(answer.num_prompt_tokens for answer in answers)
    tokens = sum(answer.num_tokens for answer in answers)
    result: dict[str, Any] = {
        "completed": len(answers),
        "failed": failed,
        "duration": seconds,
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": tokens,
        "request_throughput": len(answers) / seconds,
        "output_throughput": tokens / seconds,
        "total_token_throughput": (prompt_tokens + tokens) / seconds,
    }
    if limits:
        good = sum(is_good(answer, limits) for answer in answers)
        result |= {"request_goodput": good / seconds, "good_share": good / max(1, len(answers) + failed)}
    for name in MEASURES:
        values = 1e3 * np.array([value for answer in answers for value in _values(answer, name)])
        if len(values):
            result |= {
                f"mean_{name}_ms": float(values.mean()),
                f"median_{name}_ms": float(np.median(values)),
                f"p99_{name}_ms": float(np.percentile(values, 99)),
            }
    return result


def is_good(answer: Answer, limits: Mapping[str, float]) -> bool:
    """Whether an answer meets every limit, in milliseconds."""
    values = {name: _values(answer, name) for name in limits}
    return all(not seen or 1e3 * float(np.mean(seen)) <= limits[name] for name, seen in values.items())


def _values(answer: Answer, name: str) -> Sequence[float]:
    value = getattr(answer, name)
    if isinstance(value, tuple):
        return value
    return [] if value is None else [value]
