"""Whatever meets in the engine, greedy tokens are those of the plain uncached forward."""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from dsv3_jax.model.transformer import forward
from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.outputs import RequestOutput
from dsv3_jax.serving.params import SamplingParams
from dsv3_jax.serving.runner import Launched
from dsv3_jax.serving.sequence import StepPlan

LONGEST = 256
"""Tokens that the golden models have positions for."""
NEW = 8
ROWS = 8


class Case(NamedTuple):
    chunk: int
    """Tokens of a step at most, so those of a chunk of a prompt."""
    prefix: str
    is_preempted: bool
    batch: str
    has_aborted_neighbour: bool
    streams: bool

    def __str__(self) -> str:
        marks = [
            f"chunk{self.chunk}",
            self.prefix,
            "preempted" * self.is_preempted,
            self.batch,
            "aborted" * self.has_aborted_neighbour,
            "stream" * self.streams,
        ]
        return "-".join(filter(None, marks))


VALUES = ((16, 64, LONGEST), ("hit", "miss", "partly"), (False, True), ("alone", "mixed", "full"), *[(False, True)] * 2)
ALL = [Case(*values) for values in itertools.product(*VALUES)]


def pairs_of(case: Case) -> set[Any]:
    """Every pair of values that a case tries together."""
    return set(itertools.combinations(enumerate(case), 2))


def covering(cases: list[Case]) -> list[Case]:
    """Few of the cases that try every pair of values which any of them tries."""
    missing = set().union(*map(pairs_of, cases))
    chosen = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs_of(case) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


PAIRWISE = covering(ALL)


@partial(jax.jit, static_argnames="cfg")
def _likeliest(cfg, variables, tokens):
    return forward(cfg, variables, tokens).logits.argmax(-1)


def check_greedy(cfg: Any, variables: Any, outputs: list[RequestOutput]) -> None:
    """One uncached pass over prompt and completion: each token is the likeliest behind those before it."""
    assert all(len(output.token_ids) == NEW for output in outputs)
    rows = [[*output.prompt_token_ids, *output.token_ids] for output in outputs]
    tokens = np.zeros((ROWS, LONGEST), np.int32)
    for row, ids in zip(tokens, rows, strict=False):
        row[: len(ids)] = ids
    likeliest = np.asarray(_likeliest(cfg, variables, tokens))
    for row, output in zip(likeliest, outputs, strict=False):
        start = len(output.prompt_token_ids)
        np.testing.assert_array_equal(output.token_ids, row[start - 1 : start - 1 + NEW])


class Meeting:
    """One case on its way: what is measured, and what comes beside it."""

    def __init__(self, engine: Engine, case: Case, seed: int):
        self.engine, self.case, self.rng = engine, case, np.random.default_rng(seed)
        self.params = SamplingParams(max_tokens=NEW, ignore_eos=True)
        self.prompts = self.drawn_prompts()
        self.outputs = [RequestOutput("", tuple(prompt)) for prompt in self.prompts]
        self.neighbours: list[int] = []
        self.has_begun = False

    def draw(self, count: int) -> list[int]:
        return self.rng.integers(2, 256, count).tolist()

    def drawn_prompts(self) -> list[list[int]]:
        lengths = {
            "alone": [int(self.rng.integers(130, 200))],
            "mixed": [1, 200, *self.rng.integers(2, 200, 3).tolist()],
            "full": self.rng.integers(1, 200, ROWS).tolist(),
        }[self.case.batch]
        prompts = [self.draw(length) for length in lengths]
        if self.case.prefix == "miss":
            return prompts
        whole = max(prompts, key=len)
        self.engine.generate([whole], SamplingParams(max_tokens=1))
        shared = len(whole) if self.case.prefix == "hit" else 64 + int(self.rng.integers(1, 40))
        return [whole[: min(shared, len(prompt))] + prompt[shared:] for prompt in prompts]

    def before_step(self, plan: StepPlan) -> None:
        """Once a sequence that is measured decodes, its neighbour goes and more urgent ones take all slots."""
        if self.has_begun or not any(work.sequence.params == self.params for work in plan.decodes):
            return
        self.has_begun = True
        self.engine.abort(self.neighbours)
        if self.case.is_preempted:
            urgent = SamplingParams(max_tokens=12, ignore_eos=True)
            for _ in range(ROWS):
                self.engine.submit(self.draw(1), urgent, sink=lambda _: None, priority=-1)

    def run(self) -> list[RequestOutput]:
        if self.case.has_aborted_neighbour:
            long = SamplingParams(max_tokens=100, ignore_eos=True)
            self.neighbours = self.engine.submit(self.draw(150), long, sink=lambda _: None)
        if self.case.streams:
            for delta in self.engine.stream(self.prompts, self.params):
                self.outputs[delta.index].add(delta)
            return self.outputs
        return self.engine.generate(self.prompts, self.params)


def check(engine: Engine, model: Any, case: Case, seed: int) -> None:
    before, meeting, launch = engine.describe()["preemptions"], Meeting(engine, case, seed), engine._runner.launch

    def launch_watched(plan: StepPlan) -> Launched:
        meeting.before_step(plan)
        return launch(plan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._runner, "launch", launch_watched)
        outputs = meeting.run()
    check_greedy(*model, outputs)
    if case.is_preempted:
        assert engine.describe()["preemptions"] > before
    hits = sum(output.num_cached_tokens for output in outputs)
    assert (hits > 0) == (case.prefix != "miss")
    engine.check()


@pytest.mark.parametrize("name", ["tiny_a", "tiny_c"])
@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_pairs(engine_of, golden_model, name: str, case: Case) -> None:
    check(engine_of(name, max_num_batched_tokens=case.chunk), golden_model(name), case, seed=PAIRWISE.index(case))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_a", "tiny_c"])
@pytest.mark.parametrize("chunk", VALUES[0])
def test_all_combinations(engine_of, golden_model, name: str, chunk: int) -> None:
    for seed, case in enumerate(ALL):
        if case.chunk == chunk:
            check(engine_of(name, max_num_batched_tokens=chunk), golden_model(name), case, seed=100 + seed)
