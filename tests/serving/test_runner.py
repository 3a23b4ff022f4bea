"""A runner's steps give the tokens of the uncached forward, in few shapes and in one pool."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.serving import PAGE_SIZE, ServingConfig
from dsv3_jax.serving import edits, programs
from dsv3_jax.serving import runner as runner_module
from dsv3_jax.serving.batches import batches_of, empty_batch
from dsv3_jax.serving.generate import generate
from dsv3_jax.serving.params import SamplingParams
from dsv3_jax.serving.runner import Runner
from dsv3_jax.serving.sequence import Drawn, Sequence, StepPlan, Work
from tests.small import make_config, make_variables

ROOM = ServingConfig(max_num_seqs=4, num_pages=2000, max_num_batched_tokens=24, max_logprobs=3)

NUMBERS = itertools.count()
PROGRAMS: Any = (
    *(programs.run_rows, programs.run_chunk, programs.draw_rows, programs.find_logprobs),
    *(programs.find_prompt_logprobs, programs.prepare, edits.set_row, edits.count),
)


class Host:
    """A few sequences with pages of their own, and the steps of a scheduler that always admits them."""

    def __init__(self, runner: Runner):
        self.runner, self._free = runner, list(np.random.default_rng(0).permutation(runner.num_pages))

    def add(self, prompt: Any, seed: int = 0, stop_ids: tuple = (), **params: Any) -> Sequence:
        prompt = tuple(int(token) for token in prompt)
        how = SamplingParams(**{"max_tokens": 100, **params})
        return Sequence(next(NUMBERS), prompt, how, seed, 100, frozenset(stop_ids))

    def step(self, *counts: tuple[Sequence, int]) -> list[Drawn]:
        """Computes so many tokens of each sequence, a single one behind a prompt as a decoding row."""
        works = []
        for sequence, count in counts:
            start = sequence.num_computed
            while len(sequence.pages) * PAGE_SIZE < start + count:
                sequence.pages.append(int(self._free.pop()))
            works.append(Work(sequence, start, count))
        is_decode = [work.count == 1 and work.start >= len(work.sequence.prompt) for work in works]
        plan = StepPlan(
            tuple(work for work, one in zip(works, is_decode) if one),
            tuple(work for work, one in zip(works, is_decode) if not one),
        )
        result = self.runner.wait(self.runner.launch(plan))
        for work, drawn in zip(plan.works, result.drawn):
            work.sequence.num_computed += work.count
            work.sequence.tokens += drawn.tokens
        return list(result.drawn)

    def complete(self, *sequences: Sequence, steps: int) -> list[list[int]]:
        """Reads the prompts, then decodes; the tokens of each sequence."""
        self.step(*((sequence, len(sequence.prompt)) for sequence in sequences))
        for _ in range(steps - 1):
            self.step(*((sequence, 1) for sequence in sequences))
        return [generated(sequence) for sequence in sequences]


def generated(sequence: Sequence) -> list[int]:
    return sequence.tokens[len(sequence.prompt) :]


def logprobs_of(*drawn: Drawn) -> list:
    return [found for one in drawn for found in (*(one.prompt_logprobs or ()), *(one.logprobs or ()))]


def prompts_of(vocab_size: int, *lengths: int, seed: int = 3) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def runner(base) -> Runner:
    cfg, variables = base
    return Runner(cfg, variables, ROOM)


@pytest.mark.slow
def test_tokens_are_those_of_the_uncached_forward(runner: Runner, base, slowly) -> None:
    """Chunks, tails of a few tokens and decoding rows, alone and in one step."""
    cfg, variables = base
    prompts = prompts_of(cfg.vocab_size, 36, 5, 30)
    expected, _ = slowly(cfg, variables, prompts, 8)
    host = Host(runner)
    long, short, middle = (host.add(prompt) for prompt in prompts)
    host.step((long, 20), (short, 5))
    host.step((short, 1), (long, 16))
    host.step((short, 1), (long, 1), (middle, 22))
    host.step((short, 1), (long, 1), (middle, 8))
    for _ in range(3):
        host.step((short, 1), (long, 1), (middle, 1))
    host.step((long, 1))
    host.step((middle, 1), (long, 1))
    for sequence, row, count in zip((long, short, middle), expected, (8, 7, 5)):
        np.testing.assert_array_equal(generated(sequence), row[:count])


def test_short_prompts_are_read_together_as_they_are_alone() -> None:
    """Four of them by one program, each behind what it had; a fifth by itself."""
    cfg = make_config(mla={"nope_head_dim": 12, "v_head_dim": 9})
    runner = Runner(cfg, make_variables(cfg), dataclasses.replace(ROOM, max_num_batched_tokens=64))
    prompts = prompts_of(cfg.vocab_size, 14, 13, 16, 15, 12)
    host, alone = Host(runner), Host(runner)
    together = [host.add(prompt, logprobs=3) for prompt in prompts]
    host.step((together[0], 3))
    works = tuple(Work(one, one.num_computed, len(one.prompt) - one.num_computed) for one in together)
    assert [len(batch.items) for batch in batches_of(StepPlan((), works), runner._shapes)] == [4, 1]
    drawn = host.step(*((work.sequence, work.count) for work in works))
    for prompt, found in zip(prompts, drawn):
        (expected,) = alone.step((alone.add(prompt, logprobs=3), len(prompt)))
        assert found.tokens == expected.tokens
        for one, other in zip(logprobs_of(found), logprobs_of(expected)):
            np.testing.assert_allclose(one.logprob, other.logprob, atol=1e-5)


def test_a_request_draws_the_tokens_of_generate(runner: Runner, base) -> None:
    """Each with its own seed and cuts, beside a greedy one, decoding or reading."""
    cfg, variables = base
    prompts = prompts_of(cfg.vocab_size, 9, 20, 3)
    how = {"temperature": [0.8, 0.0, 1.5], "top_k": [0, 5, 7], "top_p": [0.9, 1.0, 1.0], "seed": [5, 6, 2**32 - 1]}
    expected = generate(cfg, variables, prompts, 6, **how)
    host = Host(runner)
    each = [{name: values[i] for name, values in how.items()} for i in range(3)]
    sequences = [host.add(prompt, **params) for prompt, params in zip(prompts, each)]
    np.testing.assert_array_equal(host.complete(*sequences, steps=6), expected)


def test_edits_follow_their_sequences_through_few_slots(runner: Runner, base) -> None:
    """Six sequences that edit take turns in four slots: each completes as it does alone."""
    cfg, _ = base
    prompts = prompts_of(cfg.vocab_size, 4, 7, 5, 3, 6, 4)
    params = [
        {"repetition_penalty": 3.0},
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2.0, "temperature": 0.7},
        {"logit_bias": {11: 100.0}},
        {"min_tokens": 3, "stop_ids": range(60)},
        {"repetition_penalty": 0.5},
    ]
    alone = []
    for prompt, one in zip(prompts, params):
        host = Host(runner)
        sequence = host.add(prompt, **one)
        alone += host.complete(sequence, steps=4)
        runner.forget(sequence)
    assert alone[3] == [11] * 4
    assert min(alone[4][:3]) >= 60
    host = Host(runner)
    sequences = [host.add(prompt, **one) for prompt, one in zip(prompts, params)]
    groups = (0, 1, 2, 3), (4, 5, 0, 1), (2, 3, 4, 5)
    reading = {i: len(prompt) for i, prompt in enumerate(prompts)}
    for _ in range(2):
        for group in groups:
            host.step(*((sequences[i], reading.pop(i, 1)) for i in group))
    assert [generated(sequence) for sequence in sequences] == alone
    for sequence in sequences:
        runner.forget(sequence)


def test_logprobs_come_only_where_they_are_asked_for(runner: Runner, base, slowly, uncached_logits) -> None:
    """Of drawn tokens and of the prompt's, in chunks, by softmax of the uncached logits."""
    cfg, variables = base
    prompts = prompts_of(cfg.vocab_size, 25, 6)
    host = Host(runner)
    asking, other = host.add(prompts[0], logprobs=2, prompt_logprobs=1, temperature=0.5), host.add(prompts[1])
    (first,) = host.step((asking, 5))
    second, none = host.step((asking, 20), (other, 6))
    row, _ = host.step((asking, 1), (other, 1))
    expected = jax.nn.log_softmax(uncached_logits(cfg, variables, [asking.tokens] * 3)[0])
    assert none.logprobs is none.prompt_logprobs is row.prompt_logprobs is first.logprobs is None
    told = logprobs_of(first, second, row)
    assert len(told) == len(asking.tokens) - 1
    for place, found in enumerate(told):
        at, token = np.asarray(expected[place]), asking.tokens[place + 1]
        np.testing.assert_allclose(found.logprob, at[token], atol=1e-4)
        assert found.rank == (at >= at[token]).sum()
        assert [token for token, _ in found.top] == list(np.argsort(-at)[: len(found.top)])
        np.testing.assert_allclose([value for _, value in found.top], np.sort(at)[::-1][: len(found.top)], atol=1e-4)
    assert [len(found.top) for found in told] == [1] * 24 + [2, 2]


def test_within_a_shape_neighbours_change_no_bit(runner: Runner, base) -> None:
    """Nor does the row, nor whether rows are used at all."""
    prompt, *others = prompts_of(base[0].vocab_size, 7, 3, 20, 24, 12, seed=8)

    def beside(*neighbours: list[int], row: int) -> list:
        host = Host(runner)
        sequence = host.add(prompt, logprobs=3)
        sequences = [host.add(neighbour) for neighbour in neighbours]
        found = host.step((sequence, 7))
        for one in sequences:
            host.step((one, len(one.prompt)))
        for _ in range(3):
            works = [(one, 1) for one in sequences]
            works.insert(row, (sequence, 1))
            found.append(host.step(*works)[row])
        return logprobs_of(*found)

    alone = beside(others[0], others[1], row=0)
    assert beside(others[2], others[3], row=2) == alone
    assert beside(others[3], others[0], others[2], row=1) == alone


def test_a_batch_invariant_runner_gives_the_same_bits_whatever_runs(base) -> None:
    """Alone and beside others, whatever the chunks are, and computed again behind a preemption."""
    cfg, variables = base
    runner = Runner(cfg, variables, dataclasses.replace(ROOM, batch_invariant=True))
    assert len([name for name in runner.shapes() if "sample" not in name]) == 2
    prompt, *others = prompts_of(cfg.vocab_size, 23, 3, 20, 10, seed=9)

    def completed(chunks: tuple[int, ...], neighbours: list[list[int]], *, is_preempted: bool) -> list:
        host = Host(runner)
        sequence = host.add(prompt, logprobs=3)
        rest = [host.add(neighbour) for neighbour in neighbours]
        found = [host.step((sequence, count))[0] for count in chunks]
        for one in rest:
            host.step((one, len(one.prompt)))
        for step in range(4):
            if is_preempted and step == 2:
                sequence.num_computed = 0
                host.step((sequence, 18))
                found.append(host.step((sequence, 8), *((one, 1) for one in rest))[-1])
            else:
                found.append(host.step((sequence, 1), *((one, 1) for one in rest))[0])
        return logprobs_of(*found)

    alone = completed((23,), [], is_preempted=False)
    assert completed((11, 12), others, is_preempted=False) == alone
    assert completed((1, 22), others[:2], is_preempted=True) == alone


def test_steps_hold_no_copy_of_the_pool(runner: Runner, base) -> None:
    arrays = runner._weights.variables, runner._pages
    size = runner._pages.nbytes
    for step, tokens in ((programs.run_rows, empty_batch(4, 1, 1)), (programs.run_chunk, empty_batch(1, 24, 1))):
        compiled = step.lower(base[0], *arrays, tokens, functions=runner._functions).compile()
        memory: Any = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < size / 10
        assert memory.alias_size_in_bytes >= size


def test_a_second_runner_compiles_nothing(base) -> None:
    """Nor does a step behind the warm-up, of whatever kind."""
    cfg, variables = base
    reports = []
    runner = Runner(cfg, variables, ROOM)
    runner.warm_up(lambda done, total: reports.append((done, total)))
    assert reports == [(i + 1, len(reports)) for i in range(len(reports))]
    assert len(runner.shapes()) <= 16
    before = [program._cache_size() for program in PROGRAMS]
    host = Host(Runner(cfg, variables, ROOM))
    asking = {"temperature": 0.5, "presence_penalty": 1.0, "logprobs": 1, "prompt_logprobs": 0}
    host.complete(*(host.add(prompt, **asking) for prompt in prompts_of(cfg.vocab_size, 9, 20, 3)), steps=2)
    host.complete(host.add([5, 6]), steps=2)
    assert [program._cache_size() for program in PROGRAMS] == before


def test_other_weights_take_effect_or_nothing_changes(base, variables_of, slowly) -> None:
    cfg, variables = base
    runner = Runner(cfg, variables, ROOM)
    before, prompts = runner.fingerprint, prompts_of(cfg.vocab_size, 6, 6, 6)

    def completed() -> list[list[int]]:
        host = Host(runner)
        return host.complete(*(host.add(prompt) for prompt in prompts), steps=4)

    tokens = completed()
    for wrong, told in (
        (variables_of(cfg, 0, jnp.bfloat16), "bfloat16"),
        ({**variables, "params": {**variables["params"], "embed": {}}}, "lack params/embed/w"),
        ({**variables, "more": np.zeros(1)}, "'more'"),
        (jax.tree.map(lambda leaf: leaf[..., None], variables), "1]"),
    ):
        with pytest.raises(ConfigError, match=told):
            runner.update_weights(wrong)
    assert runner.fingerprint == before
    runner.update_weights(variables_of(cfg, 1))
    assert runner.fingerprint != before
    np.testing.assert_array_equal(completed(), slowly(cfg, variables_of(cfg, 1), prompts, 4)[0])
    runner.update_weights(variables)
    assert runner.fingerprint == before
    assert completed() == tokens


def test_a_pool_that_does_not_fit_is_refused(base, monkeypatch) -> None:
    cfg, variables = base

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 2**20, "bytes_in_use": 2**19}

    monkeypatch.setattr(runner_module.jax, "devices", lambda: [Device()])
    with pytest.raises(ConfigError, match=r"num_pages=9999 needs .* at most 42 pages fit"):
        Runner(cfg, variables, ServingConfig(num_pages=9999))
