"""A model without arithmetic, for tests of what decides about its steps."""

import zlib
from collections.abc import Callable, Sequence

from dsv3_jax.config.serving import PAGE_SIZE
from dsv3_jax.serving.params import SamplingParams
from dsv3_jax.serving.sequence import Drawn, StepPlan, StepResult, Work
from dsv3_jax.serving.sequence import Sequence as Completion

VOCAB = 31
EOS = 5


def completion(
    number: int, prompt: Sequence[int], *, max_tokens: int = 8, priority: int = 0, salt: str = "", **params
) -> Completion:
    """A sequence that may end at `EOS`."""
    return Completion(
        id=number,
        prompt=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=0,
        max_tokens=max_tokens,
        stop_ids=frozenset({EOS}),
        priority=priority,
        cache_salt=salt,
    )


def rows_of(tokens: Sequence[int], *, salt: str, version: int) -> list[int]:
    """The latent behind each token: made of the weights, the salt and all tokens up to there."""
    row, rows = hash((version, zlib.crc32(salt.encode()))), []
    for token in tokens:
        row = hash((row, token))
        rows.append(row)
    return rows


def completed(sequence: Completion, *, version: int = 0) -> tuple[list[int], str]:
    """Tokens and finish reason of a sequence that runs alone and without a cache."""
    tokens, rows = [], rows_of(sequence.prompt, salt=sequence.cache_salt, version=version)
    row = rows[-1]
    while len(tokens) < sequence.max_tokens:
        may_stop = len(tokens) >= sequence.params.min_tokens
        tokens.append(row % VOCAB)
        if may_stop and tokens[-1] in sequence.stop_ids:
            return tokens, "stop"
        row = hash((row, tokens[-1]))
    return tokens, "length"


class FakeRunner:
    """Writes and reads rows of pages as a model does, and fails where a sequence finds rows that are not its own."""

    def __init__(self, num_pages: int):
        self.version = 0
        self.pages = [[0] * PAGE_SIZE for _ in range(num_pages)]
        self.num_computed = 0
        """Tokens, of all sequences."""
        self._rows: dict[tuple[int, int], list[int]] = {}

    def rows(self, sequence: Completion, count: int) -> list[int]:
        """Of its first `count` tokens with the present weights."""
        rows = self._rows.setdefault((self.version, sequence.id), [])
        if not rows:
            rows += rows_of(sequence.tokens[:count], salt=sequence.cache_salt, version=self.version)
        for token in sequence.tokens[len(rows) : count]:
            rows.append(hash((rows[-1], token)))
        return rows[:count]

    def run(self, plan: StepPlan, num_tokens: Callable[[], int] = lambda: 1) -> StepResult:
        """Draws `num_tokens()` tokens wherever one is due, as a step that speculates might."""
        assert all(work.count == 1 for work in plan.decodes)
        ids = [work.sequence.id for work in plan.works]
        assert len(ids) == len(set(ids))
        return StepResult(tuple(self._work(work, num_tokens) for work in plan.works))

    def _work(self, work: Work, num_tokens: Callable[[], int]) -> Drawn:
        sequence, start, end = work.sequence, work.start, work.start + work.count
        assert start < end <= len(sequence.tokens)
        rows = self.rows(sequence, end)
        for first in range(0, end, PAGE_SIZE):
            page = self.pages[sequence.pages[first // PAGE_SIZE]]
            num_old = min(max(start - first, 0), PAGE_SIZE)
            assert page[:num_old] == rows[first : first + num_old], f"sequence {sequence.id} reads foreign rows"
            new = rows[first + num_old : min(end, first + PAGE_SIZE)]
            page[num_old : num_old + len(new)] = new
        self.num_computed += work.count
        tokens, row = [], rows[-1]
        for _ in range(num_tokens() if work.draws else 0):
            tokens.append(row % VOCAB)
            row = hash((row, tokens[-1]))
        return Drawn(tuple(tokens))
