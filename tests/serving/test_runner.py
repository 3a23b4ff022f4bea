"""A runner's steps give the tokens of the uncached forward, in few shapes and in one pool."""

from typing import Any

import numpy as np
import pytest

from dsv3_jax.config.serving import PAGE_SIZE, ServingConfig
from dsv3_jax.serving.params import SamplingParams
from dsv3_jax.serving.runner import Runner
from dsv3_jax.serving.sequence import Sequence, StepPlan, Work

ROOM = ServingConfig(max_num_seqs=4, num_pages=11, max_num_batched_tokens=40)


class Host:
    """A few sequences with pages of their own, and the steps of a scheduler that always admits them."""

    def __init__(self, runner: Runner):
        self.runner, self._free = runner, list(np.random.default_rng(0).permutation(runner.num_pages))

    def add(self, prompt: Any, seed: int = 0, **params: Any) -> Sequence:
        prompt = tuple(int(token) for token in prompt)
        return Sequence(len(prompt), prompt, SamplingParams(**params), seed, 100, frozenset())

    def step(self, *counts: tuple[Sequence, int]) -> list:
        """Computes so many tokens of each sequence: one as a decode where it is the last."""
        works = []
        for sequence, count in counts:
            start = sequence.num_computed
            while len(sequence.pages) * PAGE_SIZE < start + count:
                sequence.pages.append(int(self._free.pop()))
            works.append(Work(sequence, start, count))
        is_decode = [work.count == 1 and work.start >= len(work.sequence.prompt) for work in works]
        decodes = tuple(work for work, one in zip(works, is_decode) if one)
        chunks = tuple(work for work, one in zip(works, is_decode) if not one)
        plan = StepPlan(decodes, chunks)
        result = self.runner.run(plan)
        for work, drawn in zip(plan.works, result.drawn):
            work.sequence.num_computed += work.count
            work.sequence.tokens += drawn.tokens
        return list(result.drawn)

    def decode(self, *sequences: Sequence, steps: int = 1) -> None:
        for _ in range(steps):
            self.step(*((sequence, 1) for sequence in sequences))


def prompts_of(vocab_size: int, *lengths: int, seed: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length) for length in lengths]


@pytest.fixture(scope="module")
def runner(base) -> Runner:
    cfg, variables = base
    return Runner(cfg, variables, ROOM)


def test_tokens_are_those_of_the_uncached_forward(runner: Runner, base, slowly) -> None:
    """Chunks, tails of a few tokens and decoding rows, alone and in one step."""
    cfg, variables = base
    prompts = prompts_of(cfg.vocab_size, 36, 5, 30)
    expected, _ = slowly(cfg, variables, prompts, 6)
    host = Host(runner)
    long, short, middle = (host.add(prompt) for prompt in prompts)
    host.step((long, 20), (short, 5))
    host.step((short, 1), (long, 16))
    host.step((short, 1), (long, 1), (middle, 30))
    host.decode(short, long, middle, steps=3)
    host.decode(long)
    host.decode(middle, long, steps=2)
    for sequence, row in zip((long, short, middle), expected):
        generated = sequence.tokens[len(sequence.prompt) :]
        np.testing.assert_array_equal(generated[:6], row[: len(generated)][:6])
        assert len(generated) >= 5
