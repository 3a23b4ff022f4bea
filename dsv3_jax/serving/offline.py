"""Completions of many prompts for a caller in the same process, who waits for them."""

import queue
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from dsv3_jax.serving.errors import Overloaded, RequestError, Unavailable
from dsv3_jax.serving.outputs import Delta, RequestOutput
from dsv3_jax.serving.params import SamplingParams


@runtime_checkable
class Submits(Protocol):
    """What takes requests: an `Engine`."""

    @property
    def state(self) -> str:
        """Of the engine."""
        ...

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, **options: Any) -> list[int]:
        """Begins the completions of a prompt."""
        ...

    def abort(self, ids: Sequence[int]) -> None:
        """Ends completions."""
        ...


def every(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> list[SamplingParams]:
    """One for each prompt, from one for all or as many as there are."""
    each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * num_prompts
    if len(each) != num_prompts:
        raise RequestError(f"{len(each)} params for {num_prompts} prompts; give one, or one for each.")
    return each


def pieces(
    engine: Submits,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    priority: int,
    cache_salt: str,
) -> Iterator[Delta]:
    """Submits prompts as long as there is room, and gives out what comes; aborts the rest when it is closed."""
    arrived: queue.SimpleQueue[Delta] = queue.SimpleQueue()
    waiting = list(zip(prompts, params, strict=True))[::-1]
    running: dict[int, int] = {}
    first = 0
    try:
        while waiting or running:
            while waiting:
                prompt, one = waiting[-1]
                try:
                    ids = engine.submit(
                        prompt, one, sink=arrived.put, priority=priority, cache_salt=cache_salt, first_index=first
                    )
                except Overloaded:
                    if not running:
                        raise
                    break
                waiting.pop()
                running |= {first + number: sequence for number, sequence in enumerate(ids)}
                first += one.n
            delta = arrived.get()
            if delta.finish_reason is not None:
                del running[delta.index]
                if delta.finish_reason == "abort" and engine.state in ("failed", "closed"):
                    raise Unavailable(f"the engine {engine.state} before the completion ended; its log has the reason.")
            yield delta
    finally:
        engine.abort(list(running.values()))


def in_order(
    prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], deltas: Iterator[Delta]
) -> list[RequestOutput]:
    """The pieces put together: the completions of a prompt stand side by side."""
    outputs = [
        RequestOutput(f"{row}-{number}", tuple(prompt))
        for row, (prompt, one) in enumerate(zip(prompts, params, strict=True))
        for number in range(one.n)
    ]
    for delta in deltas:
        outputs[delta.index].add(delta)
    return outputs
