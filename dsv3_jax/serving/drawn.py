"""What came back from the programs of a step, as the scheduler takes it."""

from typing import Any, NamedTuple

from dsv3_jax.serving.batches import Batch, Item
from dsv3_jax.serving.request_rows import token_logprobs
from dsv3_jax.serving.sampler import TopLogprobs
from dsv3_jax.serving.sequence import Drawn, StepPlan, StepResult, TokenLogprobs


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
            if found.prompt_logprobs is not None:
                drawn[item.index] = drawn[item.index]._replace(prompt_logprobs=_of_prompt(item, found.prompt_logprobs))
            if item.draws:
                tokens, logprobs = (int(found.ids[row]),), _of_drawn(item, row, found.logprobs)
                drawn[item.index] = drawn[item.index]._replace(tokens=tokens, logprobs=logprobs)
    return StepResult(tuple(drawn))


def _of_drawn(item: Item, row: int, found: TopLogprobs | None) -> tuple[TokenLogprobs, ...] | None:
    asked = item.work.sequence.params.logprobs
    return None if asked is None or found is None else (token_logprobs(found, row, asked),)


def _of_prompt(item: Item, found: TopLogprobs) -> tuple[TokenLogprobs, ...]:
    """Of the tokens that a chunk predicts, which end with the prompt."""
    sequence = item.work.sequence
    count = min(item.count, len(sequence.prompt) - 1 - item.start)
    return tuple(token_logprobs(found, row, sequence.params.prompt_logprobs or 0) for row in range(count))
