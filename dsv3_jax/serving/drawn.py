"""What came back from the programs of a step, as the scheduler takes it."""

from typing import Any, NamedTuple

from dsv3_jax.serving.batches import Batch, Item
from dsv3_jax.serving.request_rows import token_logprobs
from dsv3_jax.serving.sampler import TopLogprobs
from dsv3_jax.serving.sequence import Drawn, StepPlan, StepResult


class Outputs(NamedTuple):
    """Of one batch, on the device or on the host."""

    ids: Any
    """[B], the tokens behind its rows."""
    logprobs: TopLogprobs | None
    """Of these, where a request asks."""
    prompt_logprobs: TopLogprobs | None
    """Of the tokens behind each of a chunk's, where its request asks."""


def result_of(plan: StepPlan, batches: list[Batch], outputs: list[Outputs]) -> StepResult:
    """Each work's part of the outputs."""
    drawn = [Drawn(())] * len(plan.works)
    for batch, found in zip(batches, outputs, strict=True):
        for row, item in enumerate(batch.items):
            if item.draws or found.prompt_logprobs is not None:
                drawn[item.index] = _drawn(item, row, found)
    return StepResult(tuple(drawn))


def _drawn(item: Item, row: int, found: Outputs) -> Drawn:
    sequence, params = item.work.sequence, item.work.sequence.params
    tokens, logprobs, prompt_logprobs = (), None, None
    if item.draws:
        tokens = (int(found.ids[row]),)
    if item.draws and params.logprobs is not None and found.logprobs is not None:
        logprobs = (token_logprobs(found.logprobs, row, params.logprobs),)
    if params.prompt_logprobs is not None and found.prompt_logprobs is not None:
        count = min(item.start + item.count, len(sequence.prompt) - 1) - item.start
        rows = range(count)
        prompt_logprobs = tuple(token_logprobs(found.prompt_logprobs, row, params.prompt_logprobs) for row in rows)
    return Drawn(tokens, logprobs, prompt_logprobs)
