"""The engine as its callers meet it: order, aborts, other weights, and what fails."""

import queue
import re
import threading

import jax
import numpy as np
import pytest

from dsv3_jax.config.check import ConfigError
from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.serving.emitter import Reader
from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.errors import Overloaded, RequestError, Unavailable
from dsv3_jax.serving.generate import generate
from dsv3_jax.serving.params import SamplingParams

LONG = SamplingParams(max_tokens=120, ignore_eos=True)
EVERY_GOLDEN = ["tiny_a", *(pytest.param(f"tiny_{letter}", marks=pytest.mark.slow) for letter in "bcd")]


@pytest.fixture
def own_engine(golden_model):
    """An engine that a test may break; its steps have the shapes of the shared ones."""
    engines = []

    def make(**options) -> Engine:
        settings = {"max_num_seqs": 8, "num_pages": 12, "max_num_batched_tokens": 64, **options}
        engines.append(Engine(*golden_model("tiny_a"), ServingConfig(**settings)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def begin(engine: Engine, prompt: list[int], params: SamplingParams = LONG) -> tuple[list[int], queue.SimpleQueue]:
    """Ids of completions that run, and their pieces."""
    pieces: queue.SimpleQueue = queue.SimpleQueue()
    return engine.submit(prompt, params, sink=pieces.put), pieces


def last_of(pieces: queue.SimpleQueue):
    while (delta := pieces.get(timeout=60)).finish_reason is None:
        pass
    return delta


@pytest.mark.parametrize("name", EVERY_GOLDEN)
def test_ids_of_the_golden_checkpoints(engine_of, golden, name: str) -> None:
    expected = np.load(golden / "hf" / name / "expected.npz")
    prompts = expected["prompt_ids"].tolist()
    outputs = engine_of(name).generate(prompts, SamplingParams(max_tokens=16, ignore_eos=True))
    np.testing.assert_array_equal([output.token_ids for output in outputs], expected["generated_ids"])
    assert [output.prompt_token_ids for output in outputs] == [tuple(prompt) for prompt in prompts]
    assert {output.finish_reason for output in outputs} == {"length"}


@pytest.mark.slow
def test_draws_are_those_of_generate(engine_of, golden_model) -> None:
    prompts = [[5, 9, 200], [7], [11, 12, 13, 14]]
    params = [SamplingParams(max_tokens=9, temperature=1.1, seed=seed, ignore_eos=True) for seed in (3, 4, 2**32 - 1)]
    outputs = engine_of().generate(prompts, params)
    ids = generate(*golden_model("tiny_a"), prompts, 9, temperature=1.1, seed=[3, 4, 2**32 - 1])
    np.testing.assert_array_equal([output.token_ids for output in outputs], ids)


def test_completions_of_a_prompt_stand_together_and_differ(engine_of) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, n=3, seed=7, ignore_eos=True)
    outputs = engine_of().generate([[3, 4], [5, 6, 7]], params)
    assert [output.prompt_token_ids for output in outputs] == [(3, 4)] * 3 + [(5, 6, 7)] * 3
    assert len({tuple(output.token_ids) for output in outputs}) == 6
    third = engine_of().generate([[3, 4]], SamplingParams(max_tokens=12, temperature=1.5, seed=9, ignore_eos=True))
    assert third[0].token_ids == outputs[2].token_ids


def test_stop_ids_end_a_completion_from_min_tokens_on(engine_of) -> None:
    engine, prompt = engine_of(), [8, 9, 10]
    free = engine.generate([prompt], SamplingParams(max_tokens=10, ignore_eos=True))[0].token_ids
    stop = free[3]
    stopped = engine.generate([prompt], SamplingParams(max_tokens=10, ignore_eos=True, stop_token_ids=[stop]))[0]
    assert stopped.token_ids == free[: free.index(stop) + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    later = SamplingParams(max_tokens=10, ignore_eos=True, stop_token_ids=[stop], min_tokens=8)
    output = engine.generate([prompt], later)[0]
    assert len(output.token_ids) >= 8
    assert stop not in output.token_ids[:8]


def test_no_tokens_are_drawn_for_a_prompt_that_is_only_read(engine_of) -> None:
    output = engine_of().generate([[4, 5, 6]], SamplingParams(max_tokens=0, prompt_logprobs=2))[0]
    assert output.token_ids == []
    assert output.finish_reason == "length"
    assert output.prompt_logprobs[0] is None
    assert [len(place.top) for place in output.prompt_logprobs[1:]] == [2, 2]


def test_an_aborted_completion_ends_and_frees_its_pages(engine_of) -> None:
    engine = engine_of()
    ids, pieces = begin(engine, [4] * 100)
    pieces.get(timeout=60)
    engine.abort(ids)
    assert last_of(pieces).finish_reason == "abort"
    engine.abort(ids)  # once more does nothing
    engine.check()
    assert engine.describe()["pages_used"] == 0
    engine.check()  # behind the gauges of the round before
    gauges = engine.metrics.render().decode()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert re.search(rf"^dsv3:{name}{{.*}} 0.0$", gauges, re.MULTILINE)


def test_a_reader_that_fails_ends_alone(engine_of, caplog) -> None:
    engine = engine_of()

    def fail(delta) -> None:
        raise OSError("the client is gone")

    engine.submit([5] * 70, LONG, sink=fail, request_id="the-failing-one")
    assert len(engine.generate([[6, 7]], SamplingParams(max_tokens=40, ignore_eos=True))[0].token_ids) == 40
    assert "the-failing-one" in caplog.text
    assert engine.state == "ready"
    engine.check()
    assert engine.describe()["pages_used"] == 0


def test_an_answer_that_cannot_be_made_ends_alone_and_its_caller_is_told(engine_of, monkeypatch, caplog) -> None:
    engine = engine_of()
    take = Reader.take

    def fail_for_one(self, *given):
        if self.index == 1:
            raise ValueError("no text for these tokens")
        return take(self, *given)

    monkeypatch.setattr(Reader, "take", fail_for_one)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    outputs = engine.generate([[5, 6], [7, 8], [9]], params)
    assert [output.finish_reason for output in outputs] == ["length", "abort", "length"]
    assert "no text for these tokens" in caplog.text
    engine.check()
    assert engine.describe()["pages_used"] == 0


def test_tokens_after_an_update_come_from_the_new_weights(own_engine, golden_model) -> None:
    engine = own_engine()
    cfg, old = golden_model("tiny_a")
    new = jax.tree.map(lambda leaf: leaf * 1.1 if leaf.dtype == np.float32 else leaf, old)
    prompt = np.random.default_rng(0).integers(2, 256, 130).tolist()
    before = engine.generate([prompt], SamplingParams(max_tokens=1))[0]
    _, pieces = begin(engine, prompt[:70], SamplingParams(max_tokens=100, ignore_eos=True))
    tokens = list(pieces.get(timeout=60).token_ids)
    assert engine.update_weights(new) == 1
    while True:
        delta = pieces.get(timeout=60)
        tokens += delta.token_ids
        if delta.finish_reason:
            break
    assert delta.finish_reason == "length"
    assert (generate(cfg, new, [prompt[:70] + tokens[:-40]], 40)[0] == tokens[-40:]).all()
    after = engine.generate([prompt], SamplingParams(max_tokens=1))[0]
    assert before.num_cached_tokens == 0
    assert after.num_cached_tokens == 64  # the page that was computed again; the old weights' second page is not found
    assert after.token_ids == generate(cfg, new, [prompt], 1)[0].tolist()
    engine.check()


def test_other_shapes_of_weights_change_nothing(engine_of, golden_model) -> None:
    engine = engine_of()
    variables = golden_model("tiny_a")[1]
    expected = engine.generate([[3, 1, 4]], SamplingParams(max_tokens=6))[0].token_ids
    params = {**variables["params"], "embed": {"w": variables["params"]["embed"]["w"][:, :-1]}}
    with pytest.raises(ConfigError, match="embed"):
        engine.update_weights({**variables, "params": params})
    assert engine.generate([[3, 1, 4]], SamplingParams(max_tokens=6))[0].token_ids == expected


def test_requests_that_cannot_be_answered_are_refused_by_name(engine_of) -> None:
    engine = engine_of()
    for prompt, params, names, param in (
        ([], SamplingParams(), "empty", "prompt"),
        ([1, 256], SamplingParams(), "256.*255", "prompt"),
        ([-1], SamplingParams(), "-1", "prompt"),
        ([1] * 200, SamplingParams(max_tokens=57), "200.*57.*256", "max_tokens"),
        ([1] * 257, SamplingParams(max_tokens=None), "257.*256", "prompt"),
        ([1], SamplingParams(stop=["x"]), "tokenizer", "stop"),
        ([1], SamplingParams(n=17), "17.*16", "n"),
        ([1], SamplingParams(logprobs=21), "21.*20", "logprobs"),
        ([1], SamplingParams(stop_token_ids=[256]), "256", "stop_token_ids"),
        ([1], SamplingParams(logit_bias={300: 1.0}), "300", "logit_bias"),
    ):
        with pytest.raises(RequestError, match=names) as refused:
            engine.generate([prompt], params)
        assert refused.value.param == param


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -1.0),
        ("top_k", -2),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("inf")),
        ("repetition_penalty", 0.0),
        ("max_tokens", -1),
        ("min_tokens", 99),
        ("n", 0),
        ("seed", 2**64),
        ("logprobs", True),
        ("stop", [""]),
        ("logit_bias", {3: 101.0}),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(name: str, value) -> None:
    with pytest.raises(RequestError, match=name) as refused:
        SamplingParams(**{name: value})
    assert refused.value.param == name


def test_too_many_waiting_requests_are_refused_and_a_caller_in_the_process_waits(own_engine) -> None:
    engine = own_engine(max_waiting_requests=3)
    started = [begin(engine, [4, 5])]
    with pytest.raises(Overloaded, match="exceed 3"):
        started += [begin(engine, [row + 2] * 60) for row in range(40)]
    engine.abort([one for ids, _ in started for one in ids])
    outputs = engine.generate([[row + 2] for row in range(30)], SamplingParams(max_tokens=2, ignore_eos=True))
    assert all(len(output.token_ids) == 2 for output in outputs)


def test_draining_ends_what_runs_and_takes_no_more(own_engine) -> None:
    engine = own_engine()
    _, pieces = begin(engine, [4, 5, 6])
    pieces.get(timeout=60)
    drained = threading.Thread(target=engine.drain, args=(120.0,))
    drained.start()
    while engine.state != "draining":
        pass
    with pytest.raises(Unavailable, match="draining"):
        engine.generate([[1]])
    drained.join()
    assert last_of(pieces).finish_reason == "length"


def test_a_closed_engine_ends_its_callers(own_engine) -> None:
    engine = own_engine()
    stream = engine.stream([[4, 5, 6]], LONG)
    next(stream)
    engine.close()
    with pytest.raises(Unavailable, match="closed"):
        list(stream)
    with pytest.raises(Unavailable, match="closed"):
        engine.generate([[1]])
    with pytest.raises(Unavailable, match="ended"):
        engine.check()


def test_a_step_that_fails_ends_every_caller(own_engine, monkeypatch, caplog) -> None:
    engine = own_engine()
    stream = engine.stream([[4, 5, 6]], LONG)
    next(stream)

    def fail(plan):
        raise MemoryError("no room for a step")

    monkeypatch.setattr(engine._runner, "launch", fail)
    with pytest.raises(Unavailable, match="failed"):
        list(stream)
    assert engine.state == "failed"
    assert "no room for a step" in caplog.text
    with pytest.raises(Unavailable, match="failed"):
        engine.generate([[1]])


def test_leaving_a_stream_aborts_what_it_began(engine_of) -> None:
    engine = engine_of()
    stream = engine.stream([[4, 5, 6], [7] * 90], LONG)
    next(stream)
    stream.close()
    engine.check()  # behind the aborts, in the order of arrival
    assert engine.describe()["pages_used"] == 0
