"""Sampling parameters through the real engine: tokens of a plain reading, log-probabilities, and seeds in company."""

import dataclasses

import jax
import numpy as np
import pytest

from dsv3_jax.serving.outputs import RequestOutput
from dsv3_jax.serving.params import SamplingParams
from dsv3_jax.serving.sequence import TokenLogprobs
from tests.serving.plain_draws import check_draw

STOP = 77
EVERY_WAY = [
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.4},
    {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 0.9, "frequency_penalty": 2.0, "presence_penalty": -1.0},
    {"temperature": 0.6, "repetition_penalty": 0.6, "top_p": 0.9, "top_k": 80},
    {"temperature": 1.0, "logit_bias": {3: 100.0, STOP: 100.0, 200: -100.0}, "min_tokens": 5},
    {"temperature": 0.0, "logit_bias": {STOP: 60.0, 9: 50.0}, "min_tokens": 3},
    {"temperature": 1.0, "logprobs": 4, "presence_penalty": 2.0},
]


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 256, length).tolist() for length in lengths]


def params_of(way: dict, seed: int, max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(**way, seed=seed, max_tokens=max_tokens, ignore_eos=True, stop_token_ids=[STOP])


def edited(logits: np.ndarray, output: RequestOutput, count: int, params: SamplingParams) -> np.ndarray:
    """The logits that choose the completion's next token after `count`; a token at a time."""
    generated, out = output.token_ids[:count], logits.astype(np.float64)
    for token in {*generated, *output.prompt_token_ids}:
        penalty = params.repetition_penalty
        out[token] = out[token] / penalty if out[token] > 0 else out[token] * penalty
    for token in generated:
        out[token] -= params.frequency_penalty
    for token in set(generated):
        out[token] -= params.presence_penalty
    for token, bias in params.logit_bias.items():
        out[token] += bias
    if count < params.min_tokens:
        out[STOP] = -np.inf
    return out


@pytest.fixture(scope="module")
def together(engine_of) -> list[tuple[SamplingParams, RequestOutput]]:
    """One request of each kind, in one batch."""
    params = [params_of(way, seed=100 + row) for row, way in enumerate(EVERY_WAY)]
    prompts = prompts_of([5, 30, 17, 9, 2, 20, 11, 8, 36], seed=0)
    return list(zip(params, engine_of().generate(prompts, params), strict=True))


@pytest.fixture(scope="module")
def logits_behind(together, uncached_logits, golden_model) -> list[np.ndarray]:
    """Of every token of each request's row."""
    rows = [[*output.prompt_token_ids, *output.token_ids] for _, output in together]
    found = uncached_logits(*golden_model("tiny_a"), rows)
    return [logits[: len(row)] for logits, row in zip(found, rows, strict=True)]


def test_every_token_is_the_one_of_a_plain_reading(together, logits_behind) -> None:
    for (params, output), logits in zip(together, logits_behind, strict=True):
        length = len(output.prompt_token_ids)
        for count, token in enumerate(output.token_ids):
            row = edited(logits[length + count - 1], output, count, params)
            how = dataclasses.asdict(params)
            check_draw(token, row, length + count, seed=params.seed, how=how, rounding=1e-4)


def test_stop_ids_wait_for_min_tokens_and_then_end(together) -> None:
    for number, least in ((6, 5), (7, 3)):
        output = together[number][1]
        assert output.finish_reason == "stop"
        assert len(output.token_ids) == least + 1 if number == 7 else len(output.token_ids) > least
        assert output.token_ids.index(STOP) == len(output.token_ids) - 1


def check_logprobs(place: TokenLogprobs, token: int, logprobs: np.ndarray, count: int) -> None:
    np.testing.assert_allclose(place.logprob, logprobs[token], atol=1e-4)
    nearly = logprobs[token] + np.array([1e-4, -1e-4])
    assert (logprobs > nearly[0]).sum() + 1 <= place.rank <= (logprobs >= nearly[1]).sum()
    ids, found = zip(*place.top, strict=True)
    np.testing.assert_allclose(found, np.sort(logprobs)[::-1][:count], atol=1e-4)
    np.testing.assert_allclose(found, logprobs[list(ids)], atol=1e-4)
    assert len(set(ids)) == count


def test_logprobs_are_the_models_own(together, logits_behind) -> None:
    """Before temperature and penalties; only where they are asked for."""
    assert [output.logprobs is None for _, output in together] == [True] * 8 + [False]
    (_, output), logprobs = together[-1], np.asarray(jax.nn.log_softmax(logits_behind[-1]))
    assert output.logprobs is not None
    length = len(output.prompt_token_ids)
    assert len(output.logprobs) == len(output.token_ids) == 12
    for count, (place, token) in enumerate(zip(output.logprobs, output.token_ids, strict=True)):
        check_logprobs(place, token, logprobs[length + count - 1], 4)


def test_prompt_logprobs_of_prompts_in_chunks(engine_of, uncached_logits, golden_model) -> None:
    """Three prompts of 40 in steps of 64 tokens, and the same again: what the cache has of them changes nothing."""
    prompts = prompts_of([40, 47, 41], seed=3)
    params = [SamplingParams(max_tokens=count, prompt_logprobs=5) for count in (1, 0, 1)]
    logprobs = np.asarray(jax.nn.log_softmax(uncached_logits(*golden_model("tiny_a"), prompts)))
    for _ in range(2):
        for row, output in enumerate(engine_of().generate(prompts, params)):
            assert output.prompt_logprobs is not None
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == len(prompts[row])
            for at, place in enumerate(output.prompt_logprobs[1:]):
                assert place is not None
                check_logprobs(place, prompts[row][at + 1], logprobs[row, at], 5)


def test_a_seed_gives_the_same_tokens_alone_and_among_fifteen_neighbours(engine_of) -> None:
    """Sixteen requests on eight slots, with fewer pages than they need: some are preempted and computed again."""
    engine = engine_of()
    params = [params_of(EVERY_WAY[row % len(EVERY_WAY)], seed=row, max_tokens=60) for row in range(16)]
    params = [dataclasses.replace(one, stop_token_ids=(), logprobs=None) for one in params]
    prompts = prompts_of([int(length) for length in np.random.default_rng(1).integers(20, 60, 16)], seed=4)
    before = engine.describe()["preemptions"]
    company = engine.generate(prompts, params)
    assert engine.describe()["preemptions"] > before
    for row in (0, 5, 6, 7, 13):  # three of them are preempted
        alone = engine.generate([prompts[row]], [params[row]])[0]
        assert alone.token_ids == company[row].token_ids, row
    engine.check()
