"""Continuous batching, prefix cache, preemption and ends of sequences, with a runner that computes nothing."""

import itertools
import subprocess
import sys

import pytest

from dsv3_jax.config.serving import PAGE_SIZE
from dsv3_jax.serving.errors import RequestError
from dsv3_jax.serving.pages import KeyChain, PagePool
from dsv3_jax.serving.scheduler import Scheduler
from dsv3_jax.serving.sequence import Drawn, Sequence, Status, StepResult, TokenLogprobs
from tests.serving.fake_runner import EOS, FakeRunner, completed, completion


class Engine:
    """A scheduler with a fake runner, step by step."""

    def __init__(self, *, num_pages: int = 32, max_num_seqs: int = 4, max_num_batched_tokens: int = 128, **settings):
        limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        self.scheduler = Scheduler(num_pages=num_pages, fingerprint=b"weights", **limits, **settings)
        self.runner = FakeRunner(num_pages)

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)

    def step(self, num_tokens: int = 1) -> dict[int, int]:
        """Tokens that each sequence had computed."""
        plan = self.scheduler.schedule()
        self.scheduler.update(plan, self.runner.run(plan, lambda: num_tokens))
        self.scheduler.check()
        return {work.sequence.id: work.count for work in plan.works}

    def finish(self, num_tokens: int = 1) -> None:
        while self.scheduler.num_running + self.scheduler.num_waiting:
            assert self.step(num_tokens)


def prompt(length: int, *, seed: int = 0) -> list[int]:
    return [(seed * 7 + i * i) % 29 for i in range(length)]


def assert_right(*sequences: Sequence, version: int = 0) -> None:
    for sequence in sequences:
        tokens, reason = completed(sequence, version=version)
        assert sequence.tokens == [*sequence.prompt, *tokens]
        assert (sequence.status, sequence.finish_reason) == (Status.FINISHED, reason)


@pytest.mark.parametrize("budget", [5, 64, 1000])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_sequences_of_all_lengths_get_the_tokens_they_get_alone(budget, num_tokens):
    engine = Engine(num_pages=32, max_num_seqs=5, max_num_batched_tokens=budget)
    lengths = [1, 2, 63, 64, 65, 127, 128, 129, 200]
    sequences = [completion(i, prompt(n, seed=i % 2), max_tokens=70 + i) for i, n in enumerate(lengths)]
    engine.add(*sequences)
    engine.finish(num_tokens)
    assert_right(*sequences)
    assert engine.scheduler.usage == 0


def test_decoding_sequences_come_first_and_chunks_share_the_rest():
    engine = Engine(max_num_batched_tokens=100)
    engine.add(completion(0, prompt(3), max_tokens=50, min_tokens=50), completion(1, prompt(200), max_tokens=50))
    assert engine.step() == {0: 3, 1: 97}
    plan = engine.scheduler.schedule()
    assert [work.sequence.id for work in plan.decodes] == [0]
    assert [(work.sequence.id, work.start, work.count) for work in plan.chunks] == [(1, 97, 99)]


def test_a_small_rest_of_a_step_begins_no_prompt_that_it_cannot_finish():
    engine = Engine(max_num_batched_tokens=100)
    engine.add(*(completion(i, prompt(45, seed=i), max_tokens=1) for i in range(4)))
    assert [engine.step() for _ in range(2)] == [{0: 45, 1: 45}, {2: 45, 3: 45}]


def test_a_prompt_waits_for_a_slot_and_nobody_passes_it():
    engine = Engine(num_pages=4, max_num_seqs=3, max_num_batched_tokens=256)
    long = completion(1, prompt(180, seed=1), max_tokens=10)
    engine.add(completion(0, prompt(70), max_tokens=10, min_tokens=10), long, completion(2, prompt(5)))
    assert set(engine.step()) == {0}  # two of four pages are left, 1 needs three, and 2 came later
    while 0 in (computed := engine.step()):
        assert set(computed) == {0}
    assert list(computed) == [1, 2]
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (2, 0)


def test_a_prompt_of_higher_priority_comes_before_running_prompts():
    engine = Engine(max_num_batched_tokens=16)
    engine.add(completion(0, prompt(100), priority=1))
    engine.step()
    engine.add(completion(1, prompt(20, seed=1), priority=1), completion(2, prompt(20, seed=2), priority=0))
    assert [engine.step() for _ in range(2)] == [{2: 16}, {2: 4, 0: 12}]


def test_a_page_is_spare_for_every_two_that_run_when_another_starts():
    engine = Engine(num_pages=3)
    engine.add(*(completion(i, prompt(20, seed=i), max_tokens=5, min_tokens=5) for i in range(3)))
    assert set(engine.step()) == {0, 1}


def test_who_waits_with_a_higher_priority_takes_the_place_of_the_youngest_of_the_lowest():
    engine = Engine(max_num_seqs=2)
    low = [completion(i, prompt(20, seed=i), max_tokens=20, min_tokens=20, priority=1) for i in range(2)]
    engine.add(*low)
    engine.step()
    engine.add(high := completion(2, prompt(20, seed=2), max_tokens=5, min_tokens=5))
    assert set(engine.step()) == {0, 2}
    engine.finish()
    assert_right(*low, high)
    assert [one.num_preemptions for one in (*low, high)] == [0, 1, 0]


def test_nobody_is_preempted_for_one_that_would_not_fit_even_so():
    engine = Engine(num_pages=4)
    engine.add(completion(0, prompt(130), max_tokens=40, min_tokens=40))
    engine.step()
    engine.step()
    engine.add(completion(1, [*prompt(128), 1, 2], max_tokens=40, min_tokens=40, priority=1))
    engine.step()
    engine.add(completion(2, prompt(100, seed=2)))  # two pages, and 1 has one that nobody shares
    assert set(engine.step()) == {0, 1}


def test_a_higher_priority_does_not_wait_for_what_a_lower_one_computes():
    engine = Engine(max_num_batched_tokens=16)
    engine.add(completion(0, prompt(200), priority=1))
    engine.step()
    engine.add(completion(1, prompt(200)))
    assert engine.step() == {1: 16}


def test_tokens_that_come_together_are_computed_in_one_chunk():
    engine = Engine()
    engine.add(completion(0, prompt(10), max_tokens=9, min_tokens=9))
    engine.step(num_tokens=3)
    plan = engine.scheduler.schedule()
    assert [(work.start, work.count) for work in plan.chunks] == [(10, 3)]
    assert not plan.decodes


def test_the_youngest_of_the_lowest_priority_is_preempted():
    engine = Engine(num_pages=5, max_num_seqs=4)
    sequences = [
        completion(i, prompt(length, seed=i), priority=priority, max_tokens=60, min_tokens=60)
        for i, (length, priority) in enumerate([(58, 1), (62, 0), (59, 1), (60, 0)])
    ]
    engine.add(*sequences)
    while engine.scheduler.preemptions == 0:
        engine.step()
    assert [one.num_preemptions for one in sequences] == [0, 0, 1, 0]
    engine.finish()
    assert_right(*sequences)
    assert [one.num_preemptions > 0 for one in sequences] == [True, False, True, False]


def test_an_equal_beginning_is_computed_once():
    engine = Engine()
    first, second = completion(0, prompt(150)), completion(1, [*prompt(130), 1, 2, 3])
    engine.add(first)
    engine.finish()
    engine.add(second)
    assert engine.step() == {1: 5}
    engine.finish()
    assert_right(first, second)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 128)
    assert (engine.scheduler.prefix_queries, engine.scheduler.prefix_hits) == (283, 128)


def test_generated_tokens_are_found_by_the_next_turn():
    engine = Engine()
    first = completion(0, prompt(60), max_tokens=80, min_tokens=80)
    engine.add(first)
    engine.finish()
    second = completion(1, [*first.tokens, 3, 4])
    engine.add(second)
    engine.finish()
    assert second.num_cached_tokens == 128


def test_of_a_prompt_that_is_cached_whole_the_last_page_is_computed():
    engine = Engine()
    for number in range(2):
        engine.add(sequence := completion(number, prompt(128)))
        engine.finish()
        assert_right(sequence)
    assert sequence.num_cached_tokens == 64


def test_equal_prompts_that_arrive_together_share_what_the_first_computes():
    engine = Engine(max_num_batched_tokens=100, max_num_seqs=8)
    sequences = [completion(i, prompt(200)) for i in range(6)]
    engine.add(*sequences)
    engine.step()
    assert engine.scheduler.num_running == 1
    engine.finish()
    assert_right(*sequences)
    assert engine.runner.num_computed <= 200 + 5 * 8 + 6 * 7  # tails behind three pages, and what is generated


def test_who_waits_for_a_page_of_an_aborted_sequence_computes_it():
    engine = Engine(max_num_batched_tokens=10)
    second = completion(1, prompt(200))
    engine.add(completion(0, prompt(200)), second)
    engine.step()
    engine.scheduler.abort(0)
    assert engine.step() == {1: 10}
    engine.finish()
    assert_right(second)


@pytest.mark.parametrize(
    "changed", [{"salt": "two"}, {"prompt_logprobs": 1}], ids=["another salt", "log-probabilities of the prompt"]
)
def test_pages_are_not_shared_with(changed):
    engine = Engine()
    changed = {"salt": "one", **changed}
    engine.add(completion(0, prompt(150), salt="one"), completion(1, prompt(150), **changed))
    engine.finish()
    engine.add(last := completion(2, prompt(150), **changed))
    engine.finish()
    assert_right(last)
    assert last.num_cached_tokens == (128 if changed["salt"] == "two" else 0)
    assert engine.runner.num_computed > 300


def test_keys_tell_fingerprints_salts_and_beginnings_apart():
    tokens = prompt(192)
    keys = [
        *KeyChain(b"a", "").first(3, tokens),
        *KeyChain(b"a", "b").first(3, tokens),
        *KeyChain(b"a", "c").first(3, tokens),
        *KeyChain(b"ab", "").first(3, tokens),
        *KeyChain(b"", "ab").first(3, tokens),
        *KeyChain(b"a", "").first(3, [9, *tokens[1:]]),
        *KeyChain(b"a", "\ud800").first(3, tokens),
    ]
    assert len(set(keys)) == 21
    chain = KeyChain(b"a", "")
    assert chain.first(1, tokens) == keys[:1]
    assert chain.first(3, tokens) == keys[:3]


def test_without_prefix_cache_nothing_is_found():
    engine = Engine(prefix_cache=False)
    sequences = [completion(i, prompt(150)) for i in range(2)]
    engine.add(*sequences)
    engine.finish()
    assert_right(*sequences)
    assert sequences[1].num_cached_tokens == engine.scheduler.prefix_queries == 0


def test_the_least_recently_used_page_is_evicted_and_tails_before_beginnings():
    pool = PagePool(4)
    old, young = [], []
    for pages, name in ((old, b"old"), (young, b"young")):
        pool.extend(pages, 2)
        for i, page in enumerate(pages):
            pool.publish(page, name + bytes([i]))
        pool.release(pages)
    pool.share(old[:1])
    pool.release(old[:1])  # used again, so it outlives the rest
    evicted = []
    pool.extend(evicted, 3)
    assert evicted == [old[1], young[1], young[0]]
    assert pool.find([b"old\0", b"old\1"]) == old[:1]
    pool.check(evicted)


def test_new_weights_leave_no_page_of_the_old_ones():
    engine = Engine(num_pages=16)
    ended, running = completion(0, prompt(150)), completion(1, prompt(150, seed=1), max_tokens=100, min_tokens=100)
    engine.add(ended)
    engine.finish()
    engine.add(running)
    for _ in range(10):
        engine.step()
    num_before = len(running.tokens)
    plan = engine.scheduler.schedule()
    result = engine.runner.run(plan)
    engine.scheduler.forget_pages(b"other weights")
    engine.runner.version = 1
    assert engine.scheduler.update(plan, result) == []  # a token of the old weights comes too late
    assert len(running.tokens) == num_before
    engine.add(again := completion(2, prompt(150)))
    engine.finish()
    assert again.num_cached_tokens == 0
    assert_right(again, version=1)
    rest = completion(3, running.tokens[:num_before], max_tokens=len(running.tokens) - num_before, ignore_eos=True)
    rest.stop_ids = frozenset()
    assert running.tokens[num_before:] == completed(rest, version=1)[0]
    engine.add(follower := completion(4, running.prompt))
    engine.finish()
    assert follower.num_cached_tokens == 128


def test_pages_are_forgotten_though_the_fingerprint_tells_no_difference():
    engine = Engine()
    engine.add(completion(0, prompt(150)))
    engine.finish()
    engine.scheduler.forget_pages(b"weights")
    engine.add(again := completion(1, prompt(150)))
    engine.finish()
    assert again.num_cached_tokens == 0


def test_sequences_are_aborted_in_any_state():
    engine = Engine(max_num_seqs=2, max_num_batched_tokens=64)
    sequences = [completion(i, prompt(100, seed=i), max_tokens=9, min_tokens=9) for i in range(5)]
    engine.add(*sequences)
    for _ in range(2):
        engine.step()
    plan = engine.scheduler.schedule()
    result = engine.runner.run(plan)
    for number in (0, 1, 3):  # decoding, amid its prompt, waiting
        progress = engine.scheduler.abort(number)
        assert progress.finish_reason == sequences[number].finish_reason == "abort"
        assert engine.scheduler.abort(number) is None
    assert engine.scheduler.update(plan, result) == []
    engine.scheduler.check()
    assert engine.scheduler.num_waiting_tokens == 200
    engine.finish()
    assert_right(sequences[2], sequences[4])
    assert engine.scheduler.abort(2) is None
    assert engine.scheduler.abort(99) is None


def test_a_stop_string_ends_a_sequence():
    engine = Engine()
    engine.add(sequence := completion(0, prompt(10), max_tokens=50, min_tokens=50))
    engine.step()
    assert engine.scheduler.finish(0, "stop").finish_reason == sequence.finish_reason == "stop"
    assert not engine.scheduler.schedule()


def test_nothing_is_accepted_behind_the_token_that_ends_a_sequence():
    scheduler = Engine().scheduler
    scheduler.add(completion(0, prompt(10), max_tokens=3, min_tokens=2))
    scheduler.add(completion(1, prompt(10, seed=1), max_tokens=2))
    plan = scheduler.schedule()
    logprobs = tuple(TokenLogprobs(-float(i), 1, ()) for i in range(5))
    tokens = (EOS, 1, EOS, 2, 3)
    ended, full = scheduler.update(plan, StepResult((Drawn(tokens, logprobs), Drawn((1, 2, 3, 4, 5), logprobs))))
    assert (ended.drawn.tokens, ended.drawn.logprobs, ended.finish_reason) == (tokens[:3], logprobs[:3], "stop")
    assert (full.drawn.tokens, full.drawn.logprobs, full.finish_reason) == ((1, 2), logprobs[:2], "length")


def test_a_prompt_that_is_only_read_ends_when_it_is_computed():
    engine = Engine(max_num_batched_tokens=64)
    engine.add(sequence := completion(0, prompt(100), max_tokens=0))
    assert [engine.step() for _ in range(2)] == [{0: 64}, {0: 36}]
    assert (sequence.finish_reason, sequence.num_generated) == ("length", 0)


def test_prompt_logprobs_are_handed_out_once():
    """Though a preempted prompt is computed again."""
    engine = Engine(num_pages=4, max_num_batched_tokens=16, max_num_seqs=2)
    places = itertools.count(1)
    engine.add(completion(0, prompt(60), max_tokens=130, min_tokens=130))
    engine.add(sequence := completion(1, prompt(120, seed=1), max_tokens=20, min_tokens=20, prompt_logprobs=0))
    while engine.scheduler.num_running + engine.scheduler.num_waiting:
        plan = engine.scheduler.schedule()
        result = engine.runner.run(plan)
        drawn = [
            one._replace(
                prompt_logprobs=tuple(
                    TokenLogprobs(-float(place), 1, ())
                    for place in range(work.start + 1, min(work.start + work.count, 119) + 1)
                )
            )
            if work.sequence is sequence
            else one
            for work, one in zip(plan.works, result.drawn)
        ]
        for progress in engine.scheduler.update(plan, StepResult(tuple(drawn))):
            for logprobs in progress.drawn.prompt_logprobs or ():
                assert logprobs.logprob == -next(places)
    assert sequence.num_preemptions > 0
    assert next(places) == 120
    assert_right(sequence)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (completion(0, []), "empty"),
        (completion(0, prompt(300), max_tokens=0), "300 tokens.*256"),
        (completion(0, prompt(250), max_tokens=7), "max_tokens=7.*256"),
    ],
)
def test_a_sequence_that_could_never_end_is_refused(sequence, message):
    scheduler = Engine(num_pages=4).scheduler
    with pytest.raises(RequestError, match=message):
        scheduler.add(sequence)
    assert scheduler.num_waiting == 0


def test_a_sequence_that_just_fits_runs():
    engine = Engine(num_pages=4)
    engine.add(
        first := completion(0, prompt(5)), sequence := completion(1, prompt(100), max_tokens=156, min_tokens=156)
    )
    engine.finish()
    assert_right(first, sequence)
    assert len(sequence.tokens) == 4 * PAGE_SIZE
    assert sequence.num_preemptions == 0


def test_a_step_without_its_token_is_an_error():
    scheduler = Engine().scheduler
    scheduler.add(completion(0, prompt(10)))
    plan = scheduler.schedule()
    with pytest.raises(RuntimeError, match="sequence 0"):
        scheduler.update(plan, StepResult((Drawn(()),)))


def test_every_running_sequence_must_fit_into_a_step():
    with pytest.raises(ValueError, match="max_num_batched_tokens=3"):
        Engine(max_num_batched_tokens=3)


def test_the_scheduler_imports_no_jax(repository):
    code = "import sys, dsv3_jax.serving.scheduler; print({'jax', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize(("share_completions", "num_cached"), [(True, 192), (False, 64)])
def test_pages_of_a_completion_are_found_where_they_may_be(share_completions, num_cached):
    engine = Engine(share_completions=share_completions)
    first = completion(0, prompt(70), max_tokens=140, min_tokens=140)
    engine.add(first)
    engine.finish()
    assert len(first.tokens) == 210
    turn = completion(1, [*first.tokens[:200], 1, 2, 3], max_tokens=4)
    engine.add(turn)
    engine.finish()
    assert_right(first, turn)
    assert turn.num_cached_tokens == num_cached
