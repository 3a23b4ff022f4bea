"""Requests, aborts, steps, new weights in any order: pages are conserved, and everybody ends once and rightly."""

from collections import Counter
from typing import ClassVar

import hypothesis.strategies as st
import pytest
from hypothesis import seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dsv3_jax.config.serving import PAGE_SIZE
from dsv3_jax.serving.errors import RequestError
from dsv3_jax.serving.scheduler import Scheduler
from dsv3_jax.serving.sequence import Progress, Sequence, Status, StepPlan, StepResult
from tests.fresh import fresh_rng
from tests.serving.fake_runner import EOS, VOCAB, FakeRunner, completion

BEGINNINGS = [[(number + i * i) % VOCAB for i in range(600)] for number in range(2)]
NO_STEP = StepPlan((), ()), StepResult(())
LENGTHS = st.one_of(st.integers(1, 300), st.sampled_from([63, 64, 65, 128, 129, 192, 600]))


class Serving(RuleBasedStateMachine):
    """An engine's scheduler and its pool of pages, with a runner that finds every row that is not a sequence's own."""

    seen: ClassVar[Counter[str]] = Counter()

    @initialize(
        num_pages=st.integers(4, 9),
        max_num_seqs=st.integers(1, 5),
        budget=st.sampled_from([5, 16, 64, 300]),
        prefix_cache=st.sampled_from([True, True, True, False]),
        num_priorities=st.integers(1, 3),
    )
    def start(self, num_pages, max_num_seqs, budget, prefix_cache, num_priorities):
        self.scheduler = Scheduler(
            num_pages=num_pages,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            fingerprint=b"0",
            prefix_cache=prefix_cache,
        )
        self.room, self.max_num_seqs, self.budget = num_pages * PAGE_SIZE, max_num_seqs, budget
        self.num_priorities = num_priorities
        self.runner = FakeRunner(num_pages)
        self.live: dict[int, Sequence] = {}
        self.given: dict[int, list[int]] = {}
        """Tokens that each live sequence was told of."""
        self.latest_start: dict[int, int] = {}
        """The step by which each sequence that never ran must start, where all have one priority."""
        self.added: list[Sequence] = []
        self.num_steps = 0

    @rule(
        beginning=st.integers(0, 1),
        length=LENGTHS,
        own=st.lists(st.integers(0, VOCAB - 1), max_size=3),
        copies=st.integers(1, 4),
        max_tokens=st.sampled_from([0, 1, 5, 40, 70, 100]),
        min_share=st.sampled_from([0, 0.5, 1, 1]),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "", "x", "y"]),
        has_logprobs=st.sampled_from([False, False, False, True]),
    )
    def add(self, beginning, length, own, copies, max_tokens, min_share, priority, salt, has_logprobs):
        prompt = [*BEGINNINGS[beginning][:length], *own]
        params = {
            "min_tokens": int(max_tokens * min_share),
            "priority": priority % self.num_priorities,
            "prompt_logprobs": 0 if has_logprobs else None,
        }
        for _ in range(copies):
            self._add(prompt, max_tokens=max_tokens, salt=salt, **params)

    @precondition(lambda self: self.added)
    @rule(age=st.integers(0, 9), max_tokens=st.integers(1, 100))
    def go_on(self, age, max_tokens):
        """The next turn of a conversation, or a second answer to one that still runs."""
        before = self._of_age(age)
        self._add(before.tokens, max_tokens=max_tokens, salt=before.cache_salt, priority=before.priority)

    def _add(self, prompt: list[int], *, max_tokens: int, **params) -> None:
        sequence = completion(len(self.added), prompt, max_tokens=max_tokens, **params)
        self.added.append(sequence)
        longest = len(sequence.prompt) + max_tokens
        try:
            self.scheduler.add(sequence)
        except RequestError:
            assert longest > self.room
            self._count("refused")
            return
        assert longest <= self.room
        self.live[sequence.id], self.given[sequence.id] = sequence, []
        self._set_latest_start(sequence)
        self._count("added")

    def _of_age(self, age: int) -> Sequence:
        return self.added[-1 - age % len(self.added)]

    @rule(count=st.integers(1, 12), num_tokens=st.sampled_from([1, 1, 1, 2, 3]))
    def step(self, count, num_tokens):
        for _ in range(count):
            plan, result = self._run(num_tokens)
            self._accept(self.scheduler.update(plan, result))

    @precondition(lambda self: self.added)
    @rule(
        event=st.sampled_from(["abort", "abort", "stop", "weights"]),
        age=st.integers(0, 9),
        fingerprint=st.sampled_from([b"0", b"1"]),
        is_amid_step=st.booleans(),
    )
    def interrupt(self, event, age, fingerprint, is_amid_step):
        plan, result = self._run(1) if is_amid_step else NO_STEP
        number = self._of_age(age).id
        if event == "weights":
            self._change_weights(fingerprint)
        elif event == "stop":  # a string, which the output thread meets
            self._end(self.scheduler.finish(number, "stop"), number, "stop")
        else:
            self._end(self.scheduler.abort(number), number, "abort")
        self._accept(self.scheduler.update(plan, result))

    def _change_weights(self, fingerprint: bytes) -> None:
        """With a fingerprint that may not tell them apart."""
        self.runner.version += 1
        self.scheduler.forget_pages(fingerprint)
        assert self.scheduler.num_running == 0
        for sequence in self.live.values():
            self._set_latest_start(sequence)

    @invariant()
    def everything_adds_up(self):
        self.scheduler.check()
        states = Counter(sequence.status for sequence in self.live.values())
        assert states[Status.RUNNING] == self.scheduler.num_running <= self.max_num_seqs
        assert states[Status.WAITING] == self.scheduler.num_waiting
        assert states[Status.FINISHED] == 0
        readers = Counter(page for sequence in self.live.values() for page in sequence.pages)
        for sequence in self.live.values():
            for page in sequence.pages[sequence.num_computed // PAGE_SIZE :]:
                assert readers[page] == 1, "a page is shared before it is full"

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        num_operations = self.seen["operations"]
        for number in sorted(self.live)[2:]:
            self._end(self.scheduler.abort(number), number, "abort")
        for _ in range(sum(len(one.prompt) + one.max_tokens for one in self.live.values())):
            if self.live:
                plan, result = self._run(2)
                self._accept(self.scheduler.update(plan, result))
        self.seen["operations"] = num_operations  # the end is always the same, and does not count
        assert not self.live, "somebody starves"
        self.scheduler.check()
        assert self.scheduler.usage == 0
        self.seen["preempted"] += self.scheduler.preemptions
        self.seen["found"] += self.scheduler.prefix_hits

    def _run(self, num_tokens: int) -> tuple[StepPlan, StepResult]:
        plan = self.scheduler.schedule()
        assert bool(plan) == bool(self.live)
        assert sum(work.count for work in plan.works) <= self.budget
        self._count("step")
        self.num_steps += 1
        for work in plan.works:
            self.latest_start.pop(work.sequence.id, None)
        assert all(self.num_steps <= latest for latest in self.latest_start.values()), "somebody waits too long"
        return plan, self.runner.run(plan, lambda: num_tokens)

    def _accept(self, progress: list[Progress]) -> None:
        assert len({one.sequence.id for one in progress}) == len(progress)
        for sequence, drawn, finish_reason in progress:
            given = self.given[sequence.id]
            for token in drawn.tokens:
                assert not self._has_ended(sequence, given)
                assert token == self.runner.rows(sequence, len(sequence.prompt) + len(given))[-1] % VOCAB
                given.append(token)
            assert sequence.tokens == [*sequence.prompt, *given]
            assert (finish_reason is not None) == self._has_ended(sequence, given)
            if finish_reason is not None:
                assert finish_reason == ("stop" if EOS in given[sequence.params.min_tokens :] else "length")
                self._end(Progress(sequence, drawn, finish_reason), sequence.id, finish_reason)

    @staticmethod
    def _has_ended(sequence: Sequence, given: list[int]) -> bool:
        return len(given) >= sequence.max_tokens or EOS in given[sequence.params.min_tokens :]

    def _end(self, progress: Progress | None, number: int, reason: str) -> None:
        sequence = self.live.pop(number, None)
        assert (progress is None) == (sequence is None), "somebody ends twice, or never"
        if progress is not None and sequence is not None:
            assert progress.sequence is sequence
            assert (sequence.status, sequence.finish_reason, sequence.pages) == (Status.FINISHED, reason, [])
            self.latest_start.pop(number, None)
            self._count(reason)

    def _set_latest_start(self, sequence: Sequence) -> None:
        """With equal priorities the oldest sequence gets at least one token computed in every step, whatever else."""
        if self.num_priorities == 1:
            older = [one for one in self.live.values() if one.order < sequence.order]
            num_left = sum(len(one.prompt) + one.max_tokens for one in older)
            self.latest_start[sequence.id] = self.num_steps + num_left + 1

    def _count(self, event: str) -> None:
        self.seen["operations"] += 1
        self.seen[event] += 1


def run(num_operations: int) -> None:
    """Each round has a seed of its own: under CI hypothesis would draw the same examples in all of them."""
    rng = fresh_rng()
    Serving.seen.clear()
    while Serving.seen["operations"] < num_operations:
        seed(int(rng.integers(2**32)))(Serving)
        run_state_machine_as_test(Serving, settings=settings(max_examples=20, stateful_step_count=50))
    print(dict(Serving.seen))


def test_ten_thousand_operations():
    run(10_000)


@pytest.mark.slow
def test_a_hundred_thousand_operations():
    run(100_000)
    assert all(Serving.seen[event] for event in ("stop", "length", "abort", "refused", "preempted", "found"))
