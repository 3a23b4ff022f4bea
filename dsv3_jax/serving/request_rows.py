"""Requests' sampling parameters as rows of the sampler's arrays."""

from collections.abc import Iterable

import numpy as np

from dsv3_jax.serving.edits import Edits
from dsv3_jax.serving.sampler import Sampling, TopLogprobs
from dsv3_jax.serving.sequence import Sequence, TokenLogprobs

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


def sampling_rows(sequences: Iterable[Sequence | None], *, vocab_size: int) -> Sampling:
    """One entry a row; a row without a sequence is greedy, which costs nothing."""
    rows = [
        (0.0, 0, 1.0, 0.0, 0)
        if sequence is None
        else (
            _float32(sequence.params.temperature),
            min(max(sequence.params.top_k, 0), vocab_size),
            sequence.params.top_p,
            sequence.params.min_p,
            sequence.seed,
        )
        for sequence in sequences
    ]
    dtypes = (np.float32, np.int32, np.float32, np.float32, np.uint32)
    columns = zip(zip(*rows, strict=True), dtypes, strict=True)
    return Sampling(*(np.array(column, dtype) for column, dtype in columns))


def has_edits(sequence: Sequence) -> bool:
    """Whether its request changes logits, so that it needs a row of edits."""
    params = sequence.params
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or len(params.logit_bias) > 0
        or (params.min_tokens > 0 and len(sequence.stop_ids) > 0)
    )


def edit_row(sequence: Sequence, vocab_size: int) -> Edits:
    """A sequence's edits after the tokens it has, for `edits.set_row`."""
    params, length = sequence.params, len(sequence.prompt)
    in_prompt, is_stop = np.zeros(vocab_size, bool), np.zeros(vocab_size, bool)
    in_prompt[list(sequence.prompt)] = True
    is_stop[list(sequence.stop_ids)] = True
    bias = np.zeros(vocab_size, np.float32)
    bias[list(params.logit_bias)] = list(params.logit_bias.values())
    return Edits(
        counts=np.bincount(np.array(sequence.tokens[length:], np.int32), minlength=vocab_size).astype(np.int32),
        in_prompt=in_prompt,
        is_stop=is_stop,
        bias=bias,
        repetition=np.array(_float32(params.repetition_penalty), np.float32),
        presence=np.array(params.presence_penalty, np.float32),
        frequency=np.array(params.frequency_penalty, np.float32),
        may_stop_from=np.array(length + min(params.min_tokens, sequence.max_tokens), np.int32),
    )


def token_logprobs(found: TopLogprobs, row: int, count: int) -> TokenLogprobs:
    """One row of what `top_logprobs` found, as host arrays, with the `count` likeliest tokens."""
    top = zip(found.top_ids[row, :count].tolist(), found.top_logprobs[row, :count].tolist(), strict=True)
    return TokenLogprobs(float(found.logprob[row]), int(found.rank[row]), tuple(top))


def _float32(value: float) -> float:
    """A number that is positive and finite in float32 too; 0 stays 0."""
    return min(max(value, _SMALLEST), _LARGEST) if value else 0.0
